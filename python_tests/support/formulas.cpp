// The CPU kernels and what CUDA compiles, of one activation or one score, on numbers from stdin:
//
//     formulas names                   both registers, a line each
//     formulas activation NAME R F     h [R, G], da [R, F] -> for each: a [R, F], dh [R, G]
//     formulas score NAME T E K        logits [T, E], dweights [T, K] -> for each: weights [T, K],
//                                      dlogits [T, E], score_sum [E]
//
// support/toys.py links it with the kernels of a tree. With WITH_CUDA a second set of results
// follows: the gate's CUDA kernels as csrc/simt runs them, and the epilogues' own function.
#ifdef WITH_CUDA
#include <cuda_runtime.h>
#endif

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "moekernels/activation.h"
#include "moekernels/experts.h"
#include "moekernels/gate.h"
#ifdef WITH_CUDA
#include "common/activation.cuh"
#endif

using namespace moekernels;
using Floats = std::vector<float>;

namespace {

Floats read(size_t count) {
  Floats values(count);
  if (fread(values.data(), sizeof(float), count, stdin) != count) exit(3);
  return values;
}
void write(const Floats& values) { fwrite(values.data(), sizeof(float), values.size(), stdout); }

template <size_t count>
int index_of(const char* name, const char* const (&names)[count]) {
  for (size_t i = 0; i < count; ++i) {
    if (!strcmp(name, names[i])) return static_cast<int>(i);
  }
  exit(4);
}

template <size_t count>
void print(const char* const (&names)[count]) {
  for (size_t i = 0; i < count; ++i) printf("%s%s", i ? " " : "", names[i]);
  printf("\n");
}

// The experts' kernels with x for h: the weights are ones that change nothing.
void activation(Activation kind, int64_t rows, int64_t f) {
  const int64_t g = is_gated(kind) ? 2 * f : f;
  const Floats h = read(rows * g), da = read(rows * f);
  Floats w1(g * g), w2(g * f), a(rows * f), dy(rows * g), dh(rows * g), again(rows * g);
  for (int64_t i = 0; i < g; ++i) w1[i * g + i] = 1;
  for (int64_t i = 0; i < f; ++i) w2[i * f + i] = 1;
  for (int64_t r = 0; r < rows; ++r) memcpy(&dy[r * g], &da[r * f], f * sizeof(float));
  const int64_t offsets[] = {0, rows};
  ExpertsArgs of{};
  of.activation = kind;
  of.alpha = 1.5;
  of.limit = 2;
  of.x = h.data();
  of.w1 = w1.data();
  of.w2 = w2.data();
  of.offsets = offsets;
  of.num_rows = of.tokens = rows;
  of.hidden = g;
  of.ffn = f;
  of.experts = 1;
  cpu::generic::experts_up({of, again.data(), a.data()}, 0, 1);
  cpu::generic::experts_dact({of, dy.data(), h.data(), dh.data(), nullptr, nullptr}, 0, 1);
  write(a);
  write(dh);
#ifdef WITH_CUDA
  with_activation(kind, [&](auto constant) {
    for (int64_t i = 0; i < rows * f; ++i) {
      const int64_t gate = i / f * g + i % f;
      const float up = g > f ? h[gate + f] : 0;
      const auto out = cuda::activate<constant.value>(h[gate], up, of.alpha, of.limit);
      a[i] = out.a;
      dh[gate] = da[i] * out.by_gate;
      if (g > f) dh[gate + f] = da[i] * out.by_up;
    }
  });
  write(a);
  write(dh);
#endif
}

void score(GateScore kind, int64_t tokens, int64_t experts, int64_t top_k) {
  const Floats logits = read(tokens * experts), dweights = read(tokens * top_k);
  Floats weights(tokens * top_k), dlogits(tokens * experts), score_sum(experts), z_sum(1);
  std::vector<int32_t> ids(tokens * top_k);
  std::vector<int64_t> counts(experts), chunk_counts(experts);
  std::vector<double> chunk_scores(experts), chunk_z(1);
  const int64_t chunk_begin[] = {0, tokens}, chunk_segment[] = {0};
  GateArgs args{};
  args.logits = logits.data();
  args.chunk_begin = chunk_begin;
  args.chunk_segment = chunk_segment;
  args.weights = weights.data();
  args.ids = ids.data();
  args.chunk_scores = chunk_scores.data();
  args.chunk_z = chunk_z.data();
  args.chunk_counts = chunk_counts.data();
  args.score_sum = score_sum.data();
  args.counts = counts.data();
  args.z_sum = z_sum.data();
  args.tokens = tokens;
  args.experts = experts;
  args.top_k = top_k;
  args.chunks = args.segments = args.num_groups = args.groups_kept = 1;
  args.scale = 1;
  args.dtype = DType::f32;
  args.score = kind;
  args.renormalize = true;
  GateBackwardArgs back{};
  back.logits = args.logits;
  back.ids = args.ids;
  back.dweights = dweights.data();
  back.chunk_begin = chunk_begin;
  back.chunk_segment = chunk_segment;
  back.dlogits = dlogits.data();
  back.tokens = tokens;
  back.experts = experts;
  back.top_k = top_k;
  back.segments = 1;
  back.scale = 1;
  back.dtype = DType::f32;
  back.score = kind;
  back.renormalize = true;
  const auto write_all = [&] {
    write(weights);
    write(dlogits);
    write(score_sum);
  };
  cpu::generic::gate(args, 0, 1);
  cpu::generic::gate_reduce(args);
  cpu::generic::gate_backward(back, 0, 1);
  write_all();
#ifdef WITH_CUDA
  std::vector<char> scratch(cuda::gate_scratch_bytes(tokens, experts, 1));
  args.scratch = scratch.data();
  cuda::gate(args, nullptr);
  cuda::gate_backward(back, nullptr);
  write_all();
#endif
}

}  // namespace

int main(int argc, char** argv) {
  const auto number = [&](int i) { return i < argc ? atoll(argv[i]) : 0; };
  if (argc > 1 && !strcmp(argv[1], "names")) {
    print(kActivations);
    print(kGateScores);
  } else if (argc == 5 && !strcmp(argv[1], "activation")) {
    activation(static_cast<Activation>(index_of(argv[2], kActivations)), number(3), number(4));
  } else if (argc == 6 && !strcmp(argv[1], "score")) {
    score(static_cast<GateScore>(index_of(argv[2], kGateScores)), number(3), number(4), number(5));
  } else {
    return 2;
  }
  return 0;
}
