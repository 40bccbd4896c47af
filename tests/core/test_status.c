/* status.h: messages, overflow checks, growing arrays, and a refused allocation that changes nothing. */
#include "core/status.h"

#include <assert.h>
#include <string.h>

static void *refuse(void *ctx, void *block, size_t old_size, size_t new_size)
{
    (void)ctx;
    (void)block;
    (void)old_size;
    (void)new_size;
    return NULL;
}

int main(void)
{
    lp_error err = {0};
    lp_allocator heap = lp_allocator_default();
    lp_allocator full = {.resize = refuse, .ctx = NULL};
    void *block = NULL, *before;
    size_t capacity = 0, size = 0;
    int64_t wide = 0;

    assert(lp_error_set(&err, LP_ERR_PLAN, "axis %d has no index %d", 3, 7) == LP_ERR_PLAN);
    assert(err.code == LP_ERR_PLAN && strcmp(err.message, "axis 3 has no index 7") == 0);
    assert(lp_error_set(NULL, LP_ERR_TRACE, "nobody listens") == LP_ERR_TRACE);

    assert(lp_mul_size(3, 5, &size) && size == 15);
    assert(!lp_mul_size(SIZE_MAX, 2, &size) && !lp_add_size(SIZE_MAX, 1, &size));
    assert(lp_mul_i64(INT64_MAX, 1, &wide) && wide == INT64_MAX);
    assert(!lp_mul_i64(INT64_MAX, 2, &wide) && !lp_mul_i64(-1, 2, &wide));

    assert(lp_grow(&heap, &block, &capacity, 100, 4, &err) == LP_OK && capacity >= 100);
    memset(block, 1, capacity * 4);
    before = block;
    size = capacity;
    assert(lp_grow(&full, &block, &capacity, size + 1, 4, &err) == LP_ERR_NOMEM);
    assert(block == before && capacity == size && strstr(err.message, "out of memory") != NULL);
    assert(lp_grow(&heap, &block, &capacity, SIZE_MAX, 4, &err) == LP_ERR_OVERFLOW && block == before);
    lp_release(&heap, block, capacity, 4);
    return 0;
}
