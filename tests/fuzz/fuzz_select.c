/* core/select.h: any scores, keys and offsets.  What is not refused is an order, and a merge of all steps. */
#include "input.h"

#include "core/select.h"

#include <math.h>
#include <string.h>

enum { MOST = 64 };

static double some_number(input *in)
{
    static const double odd[] = {0.0, -0.0, INFINITY, -INFINITY, NAN, 5e-324, 1.7976931348623157e308, -1.0};
    uint8_t byte = input_byte(in);

    return byte < 232 ? (double)(byte % 7) : odd[byte % 8];
}

static void rank(const double *scores, size_t count)
{
    const lp_allocator heap = lp_allocator_default();
    int64_t order[MOST];
    bool seen[MOST] = {false}, numbers = true;
    lp_error err = {.message = ""};
    lp_status status = lp_select_rank(&heap, scores, count, order, &err);

    for (size_t i = 0; i < count; i++)
        numbers &= !isnan(scores[i]);
    if (status != (numbers ? LP_OK : LP_ERR_ARGUMENT) || (status != LP_OK && err.message[0] == '\0'))
        give_up("rank: status %d: %s", (int)status, err.message);
    for (size_t i = 0; status == LP_OK && i < count; i++) {
        if (order[i] < 0 || (size_t)order[i] >= count || seen[order[i]])
            give_up("rank: no order");
        seen[order[i]] = true;
        if (i > 0 && !(scores[order[i - 1]] < scores[order[i]] ||
                       (scores[order[i - 1]] == scores[order[i]] && order[i - 1] < order[i])))
            give_up("rank: %zu and %zu are out of order", i - 1, i);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    const lp_allocator heap = lp_allocator_default();
    input in = {data, data + size};
    size_t count = input_below(&in, MOST), axes = input_below(&in, 9);
    double scores[MOST];
    int64_t offsets[9] = {0}, sequence[MOST], taken[9] = {0};
    lp_error err = {.message = ""};
    lp_status status;

    for (size_t i = 0; i < count; i++)
        scores[i] = some_number(&in);
    rank(scores, count);
    for (size_t a = 0; a < axes; a++)
        offsets[a] = a == 0 && input_byte(&in) < 250 ? 0 : input_int(&in);
    offsets[axes] = (int64_t)count; /* as the binding makes sure */
    if (axes == 0 && count > 0)
        return 0;
    status = lp_select_merge(&heap, scores, offsets, axes, sequence, &err);
    if (status != LP_OK && (status != LP_ERR_ARGUMENT || err.message[0] == '\0'))
        give_up("merge: status %d: %s", (int)status, err.message);
    for (size_t i = 0; status == LP_OK && i < count; i++) {
        int64_t axis = sequence[i];
        if (axis < 0 || (size_t)axis >= axes || offsets[axis] + taken[axis] >= offsets[axis + 1])
            give_up("merge: step %zu is of axis %lld", i, (long long)axis);
        for (size_t other = 0; other < axes; other++)
            if (offsets[other] + taken[other] < offsets[other + 1] &&
                scores[offsets[other] + taken[other]] < scores[offsets[axis] + taken[axis]])
                give_up("merge: axis %zu had a lower key than %lld", other, (long long)axis);
        taken[axis]++;
    }
    return 0;
}
