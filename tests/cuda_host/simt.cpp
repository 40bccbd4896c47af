/* Kernels run on the CPU: fibers, warps and the instructions on them; see cuda_runtime.h. */
#include "cuda_runtime.h"
#include "switch.h"

#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <memory>
#include <random>
#include <vector>

namespace
{

enum { STACK = 128 * 1024 };

/* What the lanes of a warp meet in. */
enum meeting { NOTHING, SHUFFLE, LOAD, MULTIPLY };

struct lane_input {
    meeting what;
    double value;
    unsigned step;
    const unsigned char *row;
    const uint32_t *a;
    uint32_t b[2];
    float *c;
    bool brain;
};

struct warp_state {
    unsigned arrived = 0;
    uint64_t generation = 0;
    lane_input input[32];
    double value[32];
    uint32_t words[32][4];
    float sums[32][4];
};

/* What a warpgroup queued, and what it found in shared memory when it did. */
struct product {
    uint64_t a, b;
    bool add, brain;
    std::vector<uint16_t> operands;
};

struct warpgroup_state {
    unsigned arrived = 0, asked = 0;
    uint64_t generation = 0;
    std::vector<std::vector<product>> groups = {{}}; /* oldest first; the last is open */
    float (*sums[128])[4] = {};
    float held[128][16][4];
};

struct copy {
    unsigned char *to;
    unsigned char bytes[16];
};

/* Where some number of threads wait for each other. */
struct meeting_point {
    unsigned arrived = 0;
    uint64_t generation = 0;
};

/* A block of the cluster that runs. */
struct block_state {
    dim3 index;
    std::vector<warp_state> warps;
    std::vector<warpgroup_state> warpgroups;
    std::vector<unsigned char> memory;
    meeting_point all, workers;
};

struct fiber {
    place context;
    std::unique_ptr<unsigned char[]> stack;
    dim3 index;
    block_state *block;
    bool finished;
    std::vector<std::vector<copy>> copies; /* committed groups, oldest first; the last is open */
};

/* mbarrier's opaque 64 bits. */
struct barrier_state {
    uint8_t phase, count, pending, valid;
    int32_t bytes;
};

/* A tensor copy under way, into one block. */
struct box {
    block_state *block;
    size_t to, barrier; /* offsets in its shared memory */
    lp_tensor_map map;
    int feature, token, sample;
};

std::vector<fiber> fibers;
std::vector<block_state> blocks_running;
std::vector<box> boxes;
fiber *current;
place scheduler;
const std::function<void()> *running;
meeting_point cluster_meets;
uint64_t progress;
std::mt19937_64 dice(12345);

[[noreturn]] void give_up(const char *why)
{
    if (current == NULL)
        fprintf(stderr, "simt: %s\n", why);
    else
        fprintf(stderr, "simt: %s (block %u, %u; thread %u)\n", why, blockIdx.x, blockIdx.y, threadIdx.x);
    exit(1);
}

void yield()
{
    fiber *mine = current;

    simt_switch(&mine->context, &scheduler);
}

void run_fiber()
{
    (*running)();
    for (const std::vector<copy> &group : current->copies)
        if (!group.empty())
            give_up("a thread ended with copies under way");
    current->finished = true;
    ++progress;
    simt_switch(&current->context, &scheduler);
}

uint16_t half_at(const unsigned char *row, unsigned i)
{
    uint16_t bits;

    memcpy(&bits, row + 2 * i, 2);
    return bits;
}

float value_of(uint16_t bits, bool brain)
{
    unsigned exponent = bits >> 10 & 31u, mantissa = bits & 1023u;
    double magnitude;

    if (brain)
        return __uint_as_float((uint32_t)bits << 16);
    if (exponent == 31)
        magnitude = mantissa != 0 ? NAN : INFINITY;
    else
        magnitude = exponent == 0 ? ldexp(mantissa, -24) : ldexp(1024 + mantissa, (int)exponent - 25);
    return (float)(bits & 0x8000u ? -magnitude : magnitude);
}

/* PTX ISA, "Warp-level matrix load instruction: ldmatrix", .x4 with .trans. */
void load_matrices(warp_state &warp)
{
    for (unsigned lane = 0; lane < 32; lane++)
        for (unsigned matrix = 0; matrix < 4; matrix++) {
            unsigned row = lane % 4 * 2, column = lane / 4;
            uint32_t low = half_at(warp.input[matrix * 8 + row].row, column);
            uint32_t high = half_at(warp.input[matrix * 8 + row + 1].row, column);

            warp.words[lane][matrix] = low | high << 16;
        }
}

/* PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type". */
void multiply_matrices(warp_state &warp)
{
    float a[16][16], b[16][8];

    for (unsigned lane = 0; lane < 32; lane++) {
        const lane_input &in = warp.input[lane];
        unsigned group = lane / 4, pair = lane % 4 * 2;

        for (unsigned i = 0; i < 8; i++) {
            unsigned row = i < 2 || (i >= 4 && i < 6) ? group : group + 8,
                     column = pair + (i & 1) + (i >= 4 ? 8 : 0);

            a[row][column] = value_of((uint16_t)(in.a[i / 2] >> 16 * (i & 1)), in.brain);
        }
        for (unsigned i = 0; i < 4; i++)
            b[pair + (i & 1) + (i >= 2 ? 8 : 0)][group] =
                value_of((uint16_t)(in.b[i / 2] >> 16 * (i & 1)), in.brain);
    }
    for (unsigned lane = 0; lane < 32; lane++)
        for (unsigned i = 0; i < 4; i++) {
            unsigned row = i < 2 ? lane / 4 : lane / 4 + 8, column = lane % 4 * 2 + (i & 1);
            double sum = warp.input[lane].c[i];

            for (unsigned k = 0; k < 16; k++)
                sum += (double)a[row][k] * b[k][column];
            warp.sums[lane][i] = (float)sum;
        }
}

/* Meet the other lanes: the last one to come does the work. */
warp_state &meet(const lane_input &input)
{
    warp_state &warp = current->block->warps[current->index.x / 32];
    uint64_t generation = warp.generation;

    warp.input[current->index.x % 32] = input;
    if (++warp.arrived < 32) {
        while (warp.generation == generation)
            yield();
        return warp;
    }
    for (unsigned lane = 0; lane < 32; lane++)
        if (warp.input[lane].what != input.what || warp.input[lane].step != input.step)
            give_up("the lanes of a warp met in different instructions");
    if (input.what == SHUFFLE)
        for (unsigned lane = 0; lane < 32; lane++)
            warp.value[lane] = warp.input[lane ^ input.step].value;
    else if (input.what == LOAD)
        load_matrices(warp);
    else
        multiply_matrices(warp);
    warp.arrived = 0;
    ++warp.generation;
    ++progress;
    return warp;
}

/* Come to where `count` threads do. */
void come_to(meeting_point &point, unsigned count)
{
    if (++point.arrived < count)
        return;
    point.arrived = 0;
    ++point.generation;
    ++progress;
}

/* Come, and wait for the others. */
void meet_at(meeting_point &point, unsigned count)
{
    uint64_t generation = point.generation;

    come_to(point, count);
    while (point.generation == generation)
        yield();
}

unsigned char *shared_of(block_state &block)
{
    return (unsigned char *)(((uintptr_t)block.memory.data() + 1023) & ~(uintptr_t)1023);
}

/* Change a barrier, and end its phase when everything has come. */
void at_barrier(uint64_t *barrier, const std::function<void(barrier_state &)> &change)
{
    barrier_state state;

    memcpy(&state, barrier, sizeof state);
    if (state.valid != 77)
        give_up("a barrier that was not initialised");
    change(state);
    if (state.pending == 0 && state.bytes == 0) {
        state.phase ^= 1;
        state.pending = state.count;
    }
    memcpy(barrier, &state, sizeof state);
    ++progress;
}

void arrive(barrier_state &state)
{
    if (state.pending == 0)
        give_up("more arrive at a barrier than it counts");
    --state.pending;
}

/* Byte of a 16-bit value (token, feature) of a box in the 128-byte swizzle. */
size_t swizzled(unsigned token, unsigned feature)
{
    size_t address = (size_t)token * 128 + feature * 2;

    return address ^ (address >> 7 & 7u) << 4;
}

void land(const box &b)
{
    unsigned char *shared = shared_of(*b.block);
    const lp_tensor_map &map = b.map;

    for (unsigned t = 0; t < map.box_tokens; t++)
        for (unsigned f = 0; f < map.box_features; f++) {
            size_t token = (size_t)b.token + t, feature = (size_t)b.feature + f, sample = (size_t)b.sample;
            bool inside = token < map.tokens && feature < map.features && sample < map.samples;
            uint16_t value =
                inside ? map.values[(sample * map.tokens + token) * map.stride + feature] : (uint16_t)0;

            memcpy(shared + b.to + swizzled(t, f), &value, 2);
        }
    at_barrier((uint64_t *)(shared + b.barrier), [&](barrier_state &state) {
        state.bytes -= (int32_t)(map.box_tokens * map.box_features * 2);
    });
}

/* Some of the copies under way land, all of them where nothing else happens. */
void land_some(bool all)
{
    for (size_t i = 0; i < boxes.size();) {
        if (!all && dice() % 4 != 0) {
            ++i;
            continue;
        }
        const box b = boxes[i];

        boxes[i] = boxes.back();
        boxes.pop_back();
        land(b);
    }
}

void begin_block(block_state &block, unsigned rank, unsigned threads, size_t shared)
{
    block.warps.assign(threads / 32, warp_state());
    block.warpgroups.assign(threads / 128, warpgroup_state());
    block.memory.assign(shared + 1024, 0xff);
    block.all = block.workers = meeting_point();
    for (unsigned t = 0; t < threads; t++) {
        fiber &f = fibers[rank * threads + t];

        if (f.stack == NULL)
            f.stack.reset(new unsigned char[STACK]);
        f.index = dim3(t);
        f.block = &block;
        f.finished = false;
        f.copies.assign(1, {});
        prepare(&f.context, f.stack.get(), STACK, run_fiber);
    }
}

/* The blocks of a cluster, whose indices are set. */
void run_cluster(unsigned threads, size_t shared)
{
    const unsigned all = threads * (unsigned)blocks_running.size();

    cluster_meets = meeting_point();
    for (unsigned rank = 0; rank < blocks_running.size(); rank++)
        begin_block(blocks_running[rank], rank, threads, shared);
    for (unsigned left = all; left > 0;) {
        unsigned start = (unsigned)(dice() % all), step = dice() % 2 ? 1 : all - 1;
        uint64_t before = progress;

        for (unsigned i = 0; i < all; i++) {
            fiber &f = fibers[(start + i * step) % all];

            if (f.finished)
                continue;
            current = &f;
            simt_switch(&scheduler, &f.context);
            left -= f.finished;
        }
        current = NULL;
        land_some(progress == before);
        if (progress == before)
            give_up("the threads of a block wait for each other in vain");
    }
    if (!boxes.empty())
        give_up("a cluster ended with copies under way");
    for (const block_state &block : blocks_running)
        for (const warpgroup_state &group : block.warpgroups)
            if (group.groups.size() > 1 || !group.groups[0].empty())
                give_up("a block ended with products under way");
}

/* Byte in shared memory of element (feature, token) of an operand: PTX ISA, "Canonical layouts" of wgmma for the 128-byte
 * swizzle, MN-major: 64 features side by side, 8 tokens below each other; further features at the leading distance, further
 * tokens at the stride; bits 4 to 6 of the address exclusive-or bits 7 to 9. */
uint16_t operand_at(uint64_t descriptor, unsigned feature, unsigned token)
{
    unsigned begin = (unsigned)(descriptor & 0x3fff) << 4,
             leading = (unsigned)(descriptor >> 16 & 0x3fff) << 4,
             stride = (unsigned)(descriptor >> 32 & 0x3fff) << 4, address;

    if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0 || begin % 1024 != 0)
        give_up("a descriptor that is not of the 128-byte swizzle at its begin");
    address = begin + feature / 64 * leading + token / 8 * stride + token % 8 * 128 + feature % 64 * 2;
    address ^= (address >> 7 & 7u) << 4;
    return half_at(simt_shared() + (address - SIMT_SHARED_BEGINS), 0);
}

std::vector<uint16_t> operands_of(const product &p)
{
    std::vector<uint16_t> found;

    for (unsigned feature = 0; feature < 64 + 128; feature++)
        for (unsigned token = 0; token < 16; token++)
            found.push_back(feature < 64 ? operand_at(p.a, feature, token)
                                         : operand_at(p.b, feature - 64, token));
    return found;
}

/* PTX ISA, "Register fragments for wgmma.mma_async.m64nNk16": accumulator D. */
void carry_out(warpgroup_state &group, const product &p)
{
    std::vector<uint16_t> now = operands_of(p);

    if (now != p.operands)
        give_up("shared memory changed under a product");
    ++simt_device.products;
    for (unsigned thread = 0; thread < 128; thread++)
        for (unsigned i = 0; i < 64; i++) {
            unsigned row = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8,
                     column = i / 4 * 8 + thread % 4 * 2 + i % 2;
            float *to = &group.held[thread][i / 4][i % 4];
            double sum = p.add ? *to : 0.0;

            for (unsigned k = 0; k < 16; k++)
                sum += (double)value_of(now[row * 16 + k], p.brain) *
                       value_of(now[(64 + column) * 16 + k], p.brain);
            *to = (float)sum;
        }
}

/* Meet the other threads of a warpgroup; the last one to come does `work`. */
void meet_all(unsigned asked, const std::function<void(warpgroup_state &)> &work)
{
    warpgroup_state &group = current->block->warpgroups[current->index.x / 128];
    uint64_t generation = group.generation;

    if (group.arrived > 0 && group.asked != asked)
        give_up("the threads of a warpgroup met in different instructions");
    group.asked = asked;
    if (++group.arrived < 128) {
        while (group.generation == generation)
            yield();
        return;
    }
    work(group);
    group.arrived = 0;
    ++group.generation;
    ++progress;
}

enum { ARRIVE = 1000, COMMIT, PRODUCT };

} // namespace

dim3 gridDim, blockDim;
simt_device_state simt_device = {1, 9, 0, 3, cudaSuccess, false, 0, 2, true, 0};

const dim3 &simt_thread_index()
{
    return current->index;
}

const dim3 &simt_block_index()
{
    return current->block->index;
}

unsigned char *simt_shared()
{
    return shared_of(*current->block);
}

void simt_launch(dim3 blocks, unsigned threads, size_t shared, const std::function<void()> &kernel,
                 unsigned cluster)
{
    std::vector<uint64_t> order((size_t)blocks.x * blocks.y / cluster);

    if (order.empty() || blocks.y > 65535 || threads % 32 != 0 || blocks.x % cluster != 0)
        give_up("a launch with impossible dimensions");
    ++simt_device.launches;
    for (size_t i = 0; i < order.size(); i++)
        order[i] = i * cluster;
    std::shuffle(order.begin(), order.end(), dice);
    if (fibers.size() < threads * cluster)
        fibers.resize(threads * cluster);
    gridDim = blocks;
    blockDim = dim3(threads);
    running = &kernel;
    blocks_running.resize(cluster);
    for (uint64_t first : order) {
        for (unsigned rank = 0; rank < cluster; rank++) {
            uint64_t block = first + rank;

            blocks_running[rank].index = dim3((unsigned)(block % blocks.x), (unsigned)(block / blocks.x));
        }
        run_cluster(threads, shared);
    }
}

void __syncthreads()
{
    meet_at(current->block->all, blockDim.x);
}

void lp_sync_workers()
{
    if (threadIdx.x >= 256)
        give_up("a thread that is no worker meets them");
    meet_at(current->block->workers, 256);
}

double simt_shuffle_xor(double value, unsigned step)
{
    lane_input input = {};

    input.what = SHUFFLE;
    input.value = value;
    input.step = step;
    return meet(input).value[current->index.x % 32];
}

void lp_copy16(unsigned char *shared, const void *global, unsigned valid)
{
    copy c = {shared, {}};

    if ((uintptr_t)shared % 16 != 0 || (uintptr_t)global % 16 != 0 || valid > 16)
        give_up("an asynchronous copy that is not aligned");
    if (valid > 0)
        memcpy(c.bytes, global, valid);
    current->copies.back().push_back(c);
    memset(shared, 0xff, 16); /* until it is waited for */
}

void lp_copy_commit()
{
    current->copies.push_back({});
}

void simt_copy_wait(unsigned pending)
{
    std::vector<std::vector<copy>> &groups = current->copies;

    while (groups.size() - 1 > pending) {
        for (const copy &c : groups.front())
            memcpy(c.to, c.bytes, 16);
        groups.erase(groups.begin());
    }
}

void lp_load_transposed(uint32_t (&fragment)[4], const unsigned char *row)
{
    lane_input input = {};

    if ((uintptr_t)row % 16 != 0)
        give_up("a matrix row that is not aligned");
    input.what = LOAD;
    input.row = row;
    memcpy(fragment, meet(input).words[current->index.x % 32], sizeof fragment);
}

void simt_multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool brain)
{
    lane_input input = {};

    input.what = MULTIPLY;
    input.a = a;
    input.b[0] = b0;
    input.b[1] = b1;
    input.c = c;
    input.brain = brain;
    memcpy(c, meet(input).sums[current->index.x % 32], sizeof c);
}

unsigned lp_shared_address(const void *shared)
{
    return (unsigned)((const unsigned char *)shared - simt_shared()) + SIMT_SHARED_BEGINS;
}

unsigned lp_cluster_rank()
{
    return (unsigned)(current->block - blocks_running.data());
}

void lp_cluster_sync()
{
    meet_at(cluster_meets, blockDim.x * (unsigned)blocks_running.size());
}

void lp_barrier_init(uint64_t *barrier, unsigned count)
{
    barrier_state state = {0, (uint8_t)count, (uint8_t)count, 77, 0};

    memcpy(barrier, &state, sizeof state);
}

void lp_barrier_expect(uint64_t *barrier, unsigned bytes)
{
    at_barrier(barrier, [&](barrier_state &state) {
        state.bytes += (int32_t)bytes;
        arrive(state);
    });
}

void lp_barrier_wait(uint64_t *barrier, unsigned parity)
{
    for (;;) {
        barrier_state state;

        memcpy(&state, barrier, sizeof state);
        if (state.valid != 77)
            give_up("a barrier that was not initialised");
        if (state.phase != parity)
            return;
        yield();
    }
}

void lp_barrier_arrive_at(uint64_t *barrier, unsigned rank)
{
    size_t offset = (size_t)((unsigned char *)barrier - simt_shared());

    at_barrier((uint64_t *)(shared_of(blocks_running.at(rank)) + offset), arrive);
}

void *lp_tensor_map_encoder()
{
    return simt_device.maps ? &simt_device : NULL;
}

/* What the driver asks: CUDA driver API, cuTensorMapEncodeTiled. */
bool lp_tensor_map_make(lp_tensor_map *map, void *, const void *values, lp_dtype, size_t features,
                        size_t tokens, size_t samples, size_t stride, unsigned box_features,
                        unsigned box_tokens)
{
    *map = {(const uint16_t *)values, features, tokens, samples, stride, box_features, box_tokens};
    return (uintptr_t)values % 16 == 0 && stride % 8 == 0 && box_features * 2 <= 128 && box_tokens <= 256;
}

void lp_tensor_copy(unsigned char *to, const lp_tensor_map *map, uint64_t *barrier, int feature, int token,
                    int sample, uint16_t blocks)
{
    size_t offset = (size_t)(to - simt_shared()), at = (size_t)((unsigned char *)barrier - simt_shared());

    if (lp_shared_address(to) % 1024 != 0)
        give_up("a swizzled copy to an address that 1024 does not divide");
    for (unsigned rank = 0; rank < blocks_running.size(); rank++)
        if (blocks >> rank & 1) {
            memset(shared_of(blocks_running[rank]) + offset, 0xff, map->box_tokens * 128);
            boxes.push_back({&blocks_running[rank], offset, at, *map, feature, token, sample});
        }
    if (blocks >> blocks_running.size() != 0)
        give_up("a copy to a block beyond the cluster");
    ++progress;
}

void lp_warpgroup_arrive()
{
    meet_all(ARRIVE, [](warpgroup_state &) {});
}

void simt_warpgroup_multiply_add(float (&d)[16][4], uint64_t a, uint64_t b, bool add, bool brain)
{
    warpgroup_state &mine = current->block->warpgroups[current->index.x / 128];
    unsigned thread = current->index.x % 128;

    if (mine.groups.size() == 1 && mine.groups[0].empty()) /* nothing of its own is under way */
        memcpy(mine.held[thread], d, sizeof d);
    else if (mine.sums[thread] != d)
        give_up("products into other sums while some are under way");
    mine.sums[thread] = d;
    meet_all(PRODUCT, [&](warpgroup_state &group) {
        product p = {a, b, add, brain, {}};

        p.operands = operands_of(p);
        group.groups.back().push_back(p);
        for (unsigned t = 0; t < 128; t++)
            for (unsigned i = 0; i < 64; i++)
                group.sums[t][i / 4][i % 4] = NAN;
    });
}

void lp_warpgroup_commit()
{
    meet_all(COMMIT, [](warpgroup_state &group) { group.groups.push_back({}); });
}

void simt_warpgroup_wait(unsigned pending)
{
    meet_all(pending, [&](warpgroup_state &group) {
        bool worked = false;

        while (group.groups.size() - 1 > pending) {
            for (const product &p : group.groups.front())
                carry_out(group, p);
            group.groups.erase(group.groups.begin());
            worked = true;
        }
        if (worked && group.groups.size() == 1)
            for (unsigned t = 0; t < 128; t++)
                memcpy(group.sums[t], group.held[t], sizeof group.held[t]);
    });
}
