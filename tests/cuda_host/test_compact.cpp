/* Compaction of the CUDA backend, run on the CPU with thread blocks in a random order: any kept set of 1-D to 4-D tensors of
 * every width, alone and many at once, in place and into other memory, with stages from scant to ample; and the planner of
 * waves: nothing is overwritten that is still to be read, everything is covered, and there are no more waves than the rule
 * b C' <= a C allows. */
#include "host.h"

extern "C" {
#include "kernels/cuda/waves.h"
}

#include <memory>

struct cut {
    std::vector<size_t> shape;
    size_t width;
    std::vector<std::vector<int64_t>> positions; /* per dimension; empty: all stay */
    std::vector<lp_kept> kept;
    std::vector<unsigned char> want;
    std::unique_ptr<unsigned char[]> data; /* exactly the tensor, so that a checker sees a byte beyond */

    /* chance in percent that a position stays; 0 keeps one position, 100 all of them. */
    cut(const std::vector<size_t> &shape_, size_t width_, const std::vector<int> &chance)
        : shape(shape_), width(width_)
    {
        size_t bytes = width;

        positions.resize(shape.size());
        for (size_t d = 0; d < shape.size(); d++) {
            bytes *= shape[d];
            if (chance[d] == 100 && random_below(2) == 1)
                continue;
            for (size_t i = 0; i < shape[d]; i++)
                if (random_below(100) < (uint64_t)chance[d])
                    positions[d].push_back((int64_t)i);
            if (positions[d].empty())
                positions[d].push_back((int64_t)random_below(shape[d]));
        }
        for (size_t d = 0; d < shape.size(); d++)
            kept.push_back({positions[d].empty() ? NULL : positions[d].data(), positions[d].size()});
        data.reset(new unsigned char[bytes]);
        for (size_t i = 0; i < bytes; i++)
            data[i] = (unsigned char)random_below(256);
        gather(0, 0);
    }

    size_t bytes() const
    {
        size_t all = width;

        for (size_t size : shape)
            all *= size;
        return all;
    }

    void gather(size_t d, size_t at)
    {
        size_t count = d < shape.size() ? (positions[d].empty() ? shape[d] : positions[d].size()) : 0;

        if (d == shape.size()) {
            want.insert(want.end(), data.get() + at * width, data.get() + (at + 1) * width);
            return;
        }
        for (size_t i = 0; i < count; i++)
            gather(d + 1, at * shape[d] + (positions[d].empty() ? i : (size_t)positions[d][i]));
    }

    const char *name() const
    {
        static char text[200];
        int used = snprintf(text, sizeof text, "%zu-byte", width);

        for (size_t d = 0; d < shape.size(); d++)
            used += snprintf(text + used, sizeof text - (size_t)used, " %zu->%zu", shape[d],
                             positions[d].empty() ? shape[d] : positions[d].size());
        return text;
    }
};

static const std::vector<size_t> shapes[] = {
    {1},         {17},         {3000},        {1, 1},       {1, 40},        {40, 1},   {13, 29},
    {64, 64},    {100, 48},    {7, 1500},     {30, 1100},   {20, 2500},     {2, 9000}, {5, 6, 7},
    {4, 33, 16}, {3, 2, 1200}, {12, 5, 3, 3}, {2, 3, 4, 5}, {16, 16, 2, 2},
};
static const int chances[] = {0, 10, 50, 80, 97, 100};

static cut random_cut()
{
    const std::vector<size_t> &shape = shapes[random_below(sizeof shapes / sizeof *shapes)];
    std::vector<int> chance;

    for (size_t d = 0; d < shape.size(); d++)
        chance.push_back(chances[random_below(6)]);
    return cut(shape, (size_t)1 << random_below(4), chance);
}

static void check_waves(const cut &c, uint64_t stage)
{
    lp_wave_layout layout;
    lp_wave wave;
    uint64_t at, waves = 0, word, direct = 0;

    lp_wave_layout_make(&layout, (uintptr_t)c.data.get(), c.width, c.shape.data(), c.shape.size(),
                        c.kept.data());
    word = layout.word;
    CHECK(layout.total * word == c.want.size() && (uintptr_t)c.data.get() % word == 0,
          "%s: %llu words of %llu", c.name(), (unsigned long long)layout.total, (unsigned long long)word);
    for (uint64_t p = 0; p < layout.total; p++)
        if (memcmp(c.want.data() + p * word, c.data.get() + lp_wave_source(&layout, p) * word, word) != 0) {
            CHECK(false, "%s: the source of word %llu", c.name(), (unsigned long long)p);
            return;
        }
    at = lp_wave_start(&layout);
    for (uint64_t p = 0; p < at; p++)
        CHECK(lp_wave_source(&layout, p) == p, "%s: word %llu is not in place", c.name(),
              (unsigned long long)p);
    while (lp_wave_next(&layout, at, stage, &wave)) {
        CHECK(wave.begin == at && wave.end > at && wave.end <= layout.total, "%s: a wave [%llu, %llu)",
              c.name(), (unsigned long long)wave.begin, (unsigned long long)wave.end);
        if (wave.staged)
            CHECK(wave.end - wave.begin <= stage, "%s: beyond the stage", c.name());
        else
            /* Every source of this wave and of all to come lies at S(begin) or above. */
            CHECK(lp_wave_source(&layout, wave.begin) >= wave.end, "%s: [%llu, %llu) overwrites a source",
                  c.name(), (unsigned long long)wave.begin, (unsigned long long)wave.end);
        direct += wave.staged ? 0 : 1;
        at = wave.end;
        ++waves;
    }
    CHECK(at == layout.total || lp_wave_start(&layout) == layout.total, "%s: %llu of %llu words", c.name(),
          (unsigned long long)at, (unsigned long long)layout.total);
    /* A wave is half a stage at least (rounded down), or, at the end, half of what is left (rounded down). */
    uint64_t least = stage < layout.total ? stage : layout.total, most = 2;
    least = least < 2 ? 1 : least / 2;
    for (uint64_t tail = 2 * least + 1; tail > 0; tail /= 2)
        ++most;
    CHECK(waves <= layout.total / least + most, "%s: %llu waves with a stage of %llu", c.name(),
          (unsigned long long)waves, (unsigned long long)stage);
    (void)direct;
}

/* performance.md: a matrix of C columns cut to 0.8 C takes 20 to 25 waves beyond a stage worth of it. */
static void check_wave_count(void)
{
    std::vector<int64_t> kept;
    size_t shape[2] = {11008, 4096};
    lp_kept cuts[2] = {{NULL, 0}, {NULL, 0}};
    lp_wave_layout layout;
    lp_wave wave;
    uint64_t at, waves = 0;

    for (int64_t i = 0; i < 4096; i++)
        if (i % 5 != 2)
            kept.push_back(i);
    cuts[1] = {kept.data(), kept.size()};
    lp_wave_layout_make(&layout, 4096, 2, shape, 2, cuts);
    for (at = lp_wave_start(&layout); lp_wave_next(&layout, at, 131072, &wave); at = wave.end)
        ++waves;
    CHECK(at == layout.total && waves <= 27, "%llu waves", (unsigned long long)waves);
}

static void check_in_place(std::vector<cut> &cuts, size_t scratch)
{
    opened device(scratch);
    std::vector<lp_cuda_tensor> tensors;
    lp_error err = {};
    lp_status status;

    for (cut &c : cuts)
        tensors.push_back({c.data.get(), c.width, c.shape.size(), c.shape.data(), c.kept.data()});
    status = lp_cuda()->compact_many(tensors.data(), tensors.size(), &device.exec, &err);
    if (status == LP_ERR_NOMEM) { /* refused before anything moved */
        CHECK(strstr(err.message, "scratch") != NULL, "%s", err.message);
        for (cut &c : cuts) {
            std::vector<unsigned char> before = c.want;

            c.want.clear();
            c.gather(0, 0);
            CHECK(c.want == before, "%s: changed by a refused call", c.name());
        }
        return;
    }
    CHECK(status == LP_OK, "%s", err.message);
    for (const cut &c : cuts)
        CHECK(memcmp(c.data.get(), c.want.data(), c.want.size()) == 0, "%s, one of %zu, scratch %zu",
              c.name(), cuts.size(), scratch);
}

static void check_into(const cut &c)
{
    opened device(1 << 18);
    lp_error err = {};
    std::vector<unsigned char> before(c.data.get(), c.data.get() + c.bytes());
    std::unique_ptr<unsigned char[]> target(new unsigned char[c.want.size()]);

    memset(target.get(), 0xee, c.want.size());
    CHECK(lp_cuda()->operations->compact_into(target.get(), c.data.get(), c.width, c.shape.data(),
                                              c.shape.size(), c.kept.data(), &device.exec, &err) == LP_OK,
          "%s", err.message);
    CHECK(memcmp(target.get(), c.want.data(), c.want.size()) == 0, "into: %s", c.name());
    CHECK(memcmp(before.data(), c.data.get(), before.size()) == 0, "into: %s changed its source", c.name());
}

static void check_refusals(void)
{
    cut c({6, 6}, 4, {50, 50});
    int64_t twice[2] = {3, 3}, outside[1] = {6};
    lp_kept bad[2] = {{twice, 2}, {NULL, 0}};
    lp_error err = {};
    opened device(1 << 14);
    const lp_backend *operations = lp_cuda()->operations;

    CHECK(operations->compact(c.data.get(), 4, c.shape.data(), 2, bad, &device.exec, &err) == LP_ERR_ARGUMENT,
          "twice");
    bad[0] = {outside, 1};
    CHECK(operations->compact(c.data.get(), 4, c.shape.data(), 2, bad, &device.exec, &err) == LP_ERR_ARGUMENT,
          "outside");
    CHECK(operations->compact(c.data.get(), 3, c.shape.data(), 2, c.kept.data(), &device.exec, &err) ==
              LP_ERR_ARGUMENT,
          "width 3");
    simt_device.capturing = true;
    CHECK(operations->compact(c.data.get(), 4, c.shape.data(), 2, c.kept.data(), &device.exec, &err) ==
                  LP_ERR_DEVICE &&
              strstr(err.message, "cudaErrorStreamCaptureUnsupported") != NULL,
          "%s", err.message);
    simt_device.capturing = false;
    simt_device.fail = cudaErrorMemoryAllocation;
    c = cut({60, 60}, 4, {50, 50});
    CHECK(operations->compact(c.data.get(), 4, c.shape.data(), 2, c.kept.data(), &device.exec, &err) ==
                  LP_ERR_NOMEM &&
              strstr(err.message, "cudaErrorMemoryAllocation") != NULL,
          "%s", err.message);
    CHECK(cudaGetLastError() == cudaSuccess, "an error is left behind");
    CHECK(lp_cuda()->compact_many(NULL, 0, &device.exec, &err) == LP_OK, "nothing to do");
}

int main(void)
{
    check_refusals();
    check_wave_count();
    for (int i = 0; i < 400; i++)
        check_waves(random_cut(), 1 + random_below(1 << random_below(12)));
    for (int i = 0; i < 120; i++) {
        std::vector<cut> cuts;
        size_t count = i % 3 == 0 ? 1 : 1 + random_below(6);

        for (size_t k = 0; k < count; k++)
            cuts.push_back(random_cut());
        check_in_place(cuts, random_below(2) == 1 ? 1 << 20 : count * 2304 + random_below(64 * 1024));
    }
    for (int i = 0; i < 80; i++)
        check_into(random_cut());
    return check_finish("cuda_host/test_compact");
}
