// From logits to weights, ids and sums in one pass: a token's logits stay in its team's registers.
// A block takes a chunk of tokens and leaves its part of the sums; a second kernel adds the parts
// in order, so the bits are fixed.
#include "moekernels/gate.h"

#include <type_traits>

#include "common/launch.cuh"
#include "gate.cuh"

namespace moekernels::cuda {
namespace {

constexpr uint32_t kGone = 0;             // below every key
constexpr uint32_t kKept = 0xffffffffu;   // above every key
constexpr uint32_t kLeast = 0x007fffffu;  // the key of -infinity

// Integers that order like floats; NaN is taken as +infinity, both zeros alike.
__device__ uint32_t key_of(float v) {
  const uint32_t bits = v == v ? __float_as_uint(v + 0.0f) : 0x7f800000u;
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ float value_of(uint32_t key) {
  return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}

// The parts of the sums. Chunk c holds tokens of segment s: part c + s, a place that no other pair
// has.
struct Parts {
  float* scores;    // [P, E]
  int32_t* counts;  // [P, E]
  double* z;        // [P]
  int64_t chunk_tokens, chunks;
  bool vector;

  Parts(const GateArgs& args)
      : chunk_tokens(tokens_of_chunk(args.tokens)), chunks(ceil_div(args.tokens, chunk_tokens)) {
    const int64_t parts = count(args.tokens, args.segments);
    z = static_cast<double*>(args.scratch);
    scores = reinterpret_cast<float*>(z + parts);
    counts = reinterpret_cast<int32_t*>(scores + parts * args.experts);
    vector = args.experts % 8 == 0 && reinterpret_cast<uintptr_t>(args.logits) % 16 == 0;
  }
  // A chunk is a block's work: few tokens are cut finer, so that 4096 of them still make a block
  // for nearly every one of 132 SMs.
  static int64_t tokens_of_chunk(int64_t tokens) { return tokens < 16384 ? 32 : 64; }
  static int64_t count(int64_t tokens, int64_t segments) {
    return ceil_div(tokens, tokens_of_chunk(tokens)) + segments;
  }
  static int64_t bytes(int64_t tokens, int64_t experts, int64_t segments) {
    constexpr int64_t kPerExpert = sizeof(*scores) + sizeof(*counts);
    return count(tokens, segments) * (int64_t{sizeof(*z)} + kPerExpert * experts);
  }
};

// Leaves keys only in the groups that rank highest. `shared` holds a key an expert; a group's rank,
// and then whether it is kept, lies where its first expert's key was.
template <class Tm>
__device__ void keep_groups(const GateArgs& args, uint32_t (&keys)[Tm::values], uint32_t* shared,
                            uint32_t* scratch) {
  const int groups = static_cast<int>(args.num_groups),
            size = static_cast<int>(args.experts / groups);
  Tm::sync();
#pragma unroll
  for (int i = 0; i < Tm::values; ++i) {
    if (Tm::expert(i) < args.experts) shared[Tm::expert(i)] = keys[i];
  }
  Tm::sync();
  for (int g = Tm::lane(); g < groups; g += Tm::lanes) {
    uint32_t first = kGone, second = kGone;
    for (int e = g * size; e < (g + 1) * size; ++e) {
      const uint32_t key = shared[e];
      second = max(second, min(first, key));
      first = max(first, key);
    }
    shared[g * size] =
        args.sum_two && size > 1 ? key_of(value_of(first) + value_of(second)) : first;
  }
  Tm::sync();
  for (int n = 0; n < args.groups_kept; ++n) {
    uint32_t best = kGone, at = ~0u;
    for (int g = Tm::lane(); g < groups; g += Tm::lanes) {
      const uint32_t rank = shared[g * size];
      if (rank != kKept) best = max(best, rank);
    }
    best = Tm::largest(best, scratch);
    for (int g = Tm::lane(); g < groups; g += Tm::lanes) {
      if (shared[g * size] == best) at = min(at, static_cast<uint32_t>(g));
    }
    at = Tm::smallest(at, scratch);
    if (Tm::lane() == at % Tm::lanes) shared[at * size] = kKept;
    Tm::sync();
  }
#pragma unroll
  for (int i = 0; i < Tm::values; ++i) {
    const int e = Tm::expert(i);
    if (e < args.experts && shared[e / size * size] != kKept) keys[i] = kLeast;
  }
}

// The K best keys in order, the smaller id where they tie: fills ids and the chosen scores.
template <class Tm>
__device__ void choose(const GateArgs& args, uint32_t (&keys)[Tm::values],
                       const float (&scores)[Tm::values], float* chosen, int32_t* ids,
                       uint32_t* scratch) {
  for (int k = 0; k < args.top_k; ++k) {
    uint32_t best = keys[0], at = ~0u;
#pragma unroll
    for (int i = 1; i < Tm::values; ++i) best = max(best, keys[i]);
    best = Tm::largest(best, scratch);
#pragma unroll
    for (int i = Tm::values - 1; i >= 0; --i) {
      if (keys[i] == best) at = static_cast<uint32_t>(Tm::expert(i));
    }
    at = Tm::smallest(at, scratch);
    if (Tm::lane_of(static_cast<int>(at)) != Tm::lane()) continue;
#pragma unroll
    for (int i = 0; i < Tm::values; ++i) {
      if (Tm::expert(i) == static_cast<int>(at)) {
        keys[i] = kGone;
        chosen[k] = scores[i];
        ids[k] = static_cast<int32_t>(at);
      }
    }
  }
}

// The shared memory of a block, in words; the launch and the kernel both read it here.
template <class Tm>
struct GateShared {
  static constexpr int kKeys =
      kGateThreads<Tm> * Tm::values;  // a team's experts' keys, for groups;
                                      // at the end the sums of the warps
  int chosen, ids;  // [teams, K] each: scores, then weights, and ids of the chosen experts
  int counts;       // [E]
  int words;

  MOEKERNELS_BOTH explicit GateShared(const GateArgs& args)
      : chosen(kKeys),
        ids(chosen + kTeams<Tm> * static_cast<int>(args.top_k)),
        counts(ids + kTeams<Tm> * static_cast<int>(args.top_k)),
        words(counts + static_cast<int>(args.experts)) {}
};

// What one team sees of it.
struct TeamShared {
  uint32_t* keys;
  float* chosen;
  int32_t* ids;
  int32_t* counts;    // of the block
  uint32_t* scratch;  // for reductions
};

// The sums of a team's tokens.
template <class Tm>
struct TeamSums {
  float scores[Tm::values] = {};
  double z = 0;
};

// One token: scores, choice and weights, which are written, and its part of the sums. `exists`:
// else it is past the chunk, and takes part in nothing but the team's barriers.
template <class Tm>
__device__ void route_token(const GateArgs& args, int64_t t, bool exists, bool vector,
                            const TeamShared& shared, TeamSums<Tm>& sums) {
  const int experts = static_cast<int>(args.experts), top_k = static_cast<int>(args.top_k);
  const bool soft_topk = args.score == GateScore::softmax_topk;
  const bool own = is_own(args.score);
  const bool by_score = args.bias != nullptr || (args.num_groups > 1 && args.sum_two);
  const float* bias = static_cast<const float*>(args.bias);
  const bool live = exists && (args.valid == nullptr || args.valid[t]);
  float x[Tm::values], scores[Tm::values], softmax[Tm::values];
  load_logits<Tm>(args.logits, args.dtype, {t, experts, live, vector}, x);
  const float lse = soften<Tm>(x, largest<Tm>(x, shared.scratch), softmax, shared.scratch);
  float divisor = 1;
  if (own) {
    divisor = score<Tm>(x, args.score, experts, scores, shared.scratch);
  }
  const float factor = 1.0f / divisor;
  uint32_t keys[Tm::values];
#pragma unroll
  for (int i = 0; i < Tm::values; ++i) {
    const int e = Tm::expert(i);
    if (live) sums.scores[i] += own ? scores[i] * factor : softmax[i];
    if (!own) scores[i] = soft_topk ? x[i] : softmax[i];
    const float key =
        by_score ? scores[i] + (bias != nullptr && e < experts ? bias[e] : 0.0f) : x[i];
    keys[i] = e < experts ? key_of(key) : kGone;
  }
  if (args.num_groups > 1) keep_groups<Tm>(args, keys, shared.keys, shared.scratch);
  choose<Tm>(args, keys, scores, shared.chosen, shared.ids, shared.scratch);
  weigh<Tm>(shared.chosen, top_k, soft_topk, args.renormalize);
  if (exists) {
    for (int k = Tm::lane(); k < top_k; k += Tm::lanes) {
      static_cast<float*>(args.weights)[t * top_k + k] =
          live ? shared.chosen[k] * static_cast<float>(args.scale) : 0.0f;
      args.ids[t * top_k + k] = live ? shared.ids[k] : -1;
      if (live) atomicAdd(shared.counts + shared.ids[k], 1);
    }
  }
  if (live && Tm::lane() == 0) sums.z += static_cast<double>(lse) * lse;
  Tm::sync();  // the choice is read before the next token's
}

// The block's part, over the teams of a warp and then over the warps, written as part `at` (< 0:
// tokens of no segment). `words` is the block's shared memory, `counts` lies in it.
template <class Tm>
__device__ void store_part(const Parts& parts, int64_t at, int experts, TeamSums<Tm>& sums,
                           uint32_t* words, const int32_t* counts) {
  constexpr int kThreads = kGateThreads<Tm>, kAllWarps = (kThreads + kWarp - 1) / kWarp;
  constexpr int kSumWarps =
      Tm::is_block ? 1 : kAllWarps;  // a block's lanes hold other experts each
  __shared__ double z_of_warp[kAllWarps];
  float* part = reinterpret_cast<float*>(words);
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    sums.z += __shfl_xor_sync(kAllLanes, sums.z, step);
    if constexpr (Tm::lanes < kWarp) {
      if (step < Tm::lanes) continue;
#pragma unroll
      for (int i = 0; i < Tm::values; ++i) {
        sums.scores[i] += __shfl_xor_sync(kAllLanes, sums.scores[i], step);
      }
    }
  }
  __syncthreads();  // group keys are read, counts are complete
  if (lane == 0) z_of_warp[threadIdx.x / kWarp] = sums.z;
  if (Tm::is_block || lane < Tm::lanes) {
    const int warp = Tm::is_block ? 0 : threadIdx.x / kWarp;
#pragma unroll
    for (int i = 0; i < Tm::values; ++i) {
      part[warp * Tm::lanes * Tm::values + Tm::expert(i)] = sums.scores[i];
    }
  }
  __syncthreads();
  if (at >= 0) {
    for (int e = threadIdx.x; e < experts; e += kThreads) {
      float sum = 0;
#pragma unroll
      for (int w = 0; w < kSumWarps; ++w) sum += part[w * Tm::lanes * Tm::values + e];
      parts.scores[at * experts + e] = sum;
      parts.counts[at * experts + e] = counts[e];
    }
    if (threadIdx.x == 0) {
      double sum = 0;
      for (int w = 0; w < kAllWarps; ++w) sum += z_of_warp[w];
      parts.z[at] = sum;
    }
  }
  __syncthreads();
}

// A block's chunk, segment by segment, a token a team.
template <class Tm>
__global__ void __launch_bounds__(kGateThreads<Tm>)
    gate_tokens(const GateArgs args, const Parts parts) {
  MOEKERNELS_DYNAMIC_SHARED(uint32_t, words);
  __shared__ uint32_t scratch[4];
  const GateShared<Tm> at(args);
  const int experts = static_cast<int>(args.experts), top_k = static_cast<int>(args.top_k);
  const int team = Tm::team_of_block();
  const TeamShared shared{
      .keys = words + team * Tm::lanes * Tm::values,
      .chosen = reinterpret_cast<float*>(words + at.chosen) + team * top_k,
      .ids = reinterpret_cast<int32_t*>(words + at.ids) + team * top_k,
      .counts = reinterpret_cast<int32_t*>(words + at.counts),
      .scratch = scratch,
  };
  const int64_t chunk = blockIdx.x;
  const int64_t stop = min((chunk + 1) * parts.chunk_tokens, args.tokens);
  for (int64_t begin = chunk * parts.chunk_tokens, end; begin < stop; begin = end) {
    // The tokens of one segment within the chunk.
    int64_t segment = 0;
    end = stop;
    if (args.offsets != nullptr) {
      const int64_t up_to = offsets_up_to(args.offsets, args.segments, begin);
      segment = up_to <= args.segments ? up_to - 1 : -1;
      if (up_to <= args.segments) end = max(begin + 1, min(args.offsets[up_to], stop));
    }
    for (int e = threadIdx.x; e < experts; e += kGateThreads<Tm>) shared.counts[e] = 0;
    __syncthreads();
    TeamSums<Tm> sums;
    for (int64_t first = begin; first < end; first += kTeams<Tm>) {
      const int64_t t = first + team;
      route_token<Tm>(args, t, t < end, parts.vector, shared, sums);
    }
    store_part<Tm>(parts, segment >= 0 ? chunk + segment : -1, experts, sums, words, shared.counts);
  }
}

constexpr int kMostWarps = 32;

// A block adds the parts of one segment for a warp of experts, a lane each; its warps take every
// n-th part.
__global__ void __launch_bounds__(kMostWarps* kWarp)
    gate_add_parts(const GateArgs args, const Parts parts) {
  __shared__ double sums[kMostWarps][kWarp];
  __shared__ int64_t counts[kMostWarps][kWarp];
  const int64_t tiles = (args.experts + kWarp - 1) / kWarp;
  const int64_t segment = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp, lane = lane_id();
  int64_t begin = 0, end = args.tokens;
  if (args.offsets != nullptr) {
    begin = min(max(args.offsets[segment], int64_t{0}), args.tokens);
    end = min(args.offsets[segment + 1], args.tokens);
  }
  const int64_t first = begin / parts.chunk_tokens + segment;
  const int64_t last = end > begin ? (end - 1) / parts.chunk_tokens + 1 + segment : first;
  const int64_t e = tile * kWarp + lane;
  double sum = 0;
  int64_t count = 0;
  if (e < args.experts) {
#pragma unroll 4
    for (int64_t p = first + warp; p < last; p += warps) {
      sum += parts.scores[p * args.experts + e];
      count += parts.counts[p * args.experts + e];
    }
  }
  sums[warp][lane] = sum;
  counts[warp][lane] = count;
  __syncthreads();
  if (warp != 0) return;
  for (int w = 1; w < warps; ++w) {
    sum += sums[w][lane];
    count += counts[w][lane];
  }
  if (e < args.experts) {
    static_cast<float*>(args.score_sum)[segment * args.experts + e] = static_cast<float>(sum);
    args.counts[segment * args.experts + e] = count;
  }
  if (tile != 0) return;
  double z = 0;
  for (int64_t p = first + lane; p < last; p += kWarp) z += parts.z[p];
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) z += __shfl_xor_sync(kAllLanes, z, step);
  if (lane == 0) static_cast<float*>(args.z_sum)[segment] = static_cast<float>(z);
}

}  // namespace

int64_t gate_scratch_bytes(int64_t tokens, int64_t experts, int64_t segments) {
  return Parts::bytes(tokens, experts, segments);
}

void gate(const GateArgs& args, Stream stream) {
  const Parts parts(args);
  with_team(args.experts, [&](auto team) {
    using Tm = decltype(team);
    launch("gate", gate_tokens<Tm>, parts.chunks, kGateThreads<Tm>,
           GateShared<Tm>(args).words * int64_t{sizeof(uint32_t)}, stream, args, parts);
  });
  // As many warps as a segment has parts on average, whatever their contents.
  int64_t warps = 4;
  while (warps < kMostWarps && warps * args.segments < parts.chunks) warps *= 2;
  launch("gate", gate_add_parts, args.segments * ceil_div(args.experts, kWarp),
         static_cast<int>(warps) * kWarp, 0, stream, args, parts);
}

}  // namespace moekernels::cuda
