// Router logits to weights, ids and sums: checks, the cut into chunks, memory.
#include "moekernels/gate.h"

#include <algorithm>

#include "bundle.h"
#include "device.h"

namespace moekernels::binding {
namespace {

// Chunks of at most kGateChunk tokens, each within one segment. Offsets that leave [0, T] or fall
// are pulled back.
struct Chunks {
  std::vector<int64_t> begin{0}, segment;

  Chunks(int64_t tokens, const OptionalTensor& segments, bool device) {
    if (device) return;  // it cuts the tokens itself: the offsets lie there
    if (!segments) {
      cut(tokens, 0);
      return;
    }
    const int64_t* offsets = segments->const_data_ptr<int64_t>();
    for (int64_t s = 0; s + 1 < segments->size(0); ++s) {
      cut(std::min(offsets[s], tokens), -1);
      cut(std::min(offsets[s + 1], tokens), s);
    }
    cut(tokens, -1);
  }

  void cut(int64_t end, int64_t of) {
    while (begin.back() < end) {
      begin.push_back(std::min(begin.back() + kGateChunk, end));
      segment.push_back(of);
    }
  }
  int64_t size() const { return static_cast<int64_t>(segment.size()); }
};

// Chunks that are worth a thread: about 16384 logits.
int64_t chunks_of_a_thread(int64_t experts) { return 16384 / (kGateChunk * experts) + 1; }

int64_t check_segments(const char* op, const OptionalTensor& segments, const Tensor& like) {
  if (!segments) return 1;
  check_tensor(op, "segments", *segments, kInt64, {{"S+1"}}, &like);
  check(segments->size(0) >= 1, op, ": segments must hold at least one offset, got int64 [0]");
  return segments->size(0) - 1;
}

void check_device_limits(const char* op, const Tensor& logits, int64_t top_k) {
  if (!on_cuda(logits)) return;
  check(logits.size(1) <= cuda::kGateMostExperts && top_k <= cuda::kGateMostTopK, op,
        ": CUDA takes up to E=", cuda::kGateMostExperts, " and top_k=", cuda::kGateMostTopK,
        ", got logits ", shape_of(logits), " and top_k=", top_k);
}

// Logits, and how experts are chosen by them, in the order of ops/gate.py's Choice.
#define MOEKERNELS_GATING(F)  \
  F(Tensor, logits)           \
  F(int64_t, top_k)           \
  F(std::string, score)       \
  F(OptionalTensor, bias)     \
  F(int64_t, num_groups)      \
  F(int64_t, groups_kept)     \
  F(std::string, group_score) \
  F(bool, renormalize)        \
  F(double, scale)
MOEKERNELS_BUNDLE(Gating, MOEKERNELS_GATING);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gate(const Gating& gating,
                                                        OptionalTensor segments,
                                                        OptionalTensor valid) {
  const auto score = named<GateScore>("gate", "score", kGateScores, gating.score);
  const auto group_score =
      named<GroupScore>("gate", "group_score", kGroupScores, gating.group_score);
  const Tensor& logits = gating.logits;
  const int64_t top_k = gating.top_k, num_groups = gating.num_groups;
  const int64_t groups_kept = gating.groups_kept;
  check_tensor("gate", "logits", logits, kFloats, {{"T"}, {"E"}});
  const int64_t tokens = logits.size(0), experts = logits.size(1);
  const ScalarType wide_dtype = wide(logits.scalar_type());
  check(top_k >= 1 && top_k <= experts, "gate: top_k must be in [1, E=", experts, "], got ", top_k);
  check(num_groups >= 1 && experts % num_groups == 0, "gate: num_groups must divide E=", experts,
        ", got ", num_groups);
  check(groups_kept >= 1 && groups_kept <= num_groups, "gate: groups_kept must be in [1, ",
        num_groups, "], got ", groups_kept);
  check(groups_kept * (experts / num_groups) >= top_k, "gate: the ", groups_kept,
        " groups kept hold ", groups_kept * (experts / num_groups),
        " experts, fewer than top_k=", top_k);
  check_optional("gate", "bias", gating.bias, {wide_dtype}, {{"E", experts}}, logits);
  check_optional("gate", "valid", valid, {ScalarType::Bool}, {{"T", tokens}}, logits);
  const int64_t num_segments = check_segments("gate", segments, logits);
  check_device_limits("gate", logits, top_k);

  const Chunks chunks(tokens, segments, on_cuda(logits));
  Tensor weights = empty({tokens, top_k}, wide_dtype, logits);
  Tensor ids = empty({tokens, top_k}, ScalarType::Int, logits);
  Tensor score_sum = empty({num_segments, experts}, wide_dtype, logits);
  Tensor counts = empty({num_segments, experts}, ScalarType::Long, logits);
  Tensor z_sum = empty({num_segments}, wide_dtype, logits);
  std::vector<double> sums(chunks.size() * (experts + 1));
  std::vector<int64_t> chunk_counts(chunks.size() * experts);
  OptionalTensor scratch;
  if constexpr (kWithCuda) {
    if (on_cuda(logits)) {
      const int64_t bytes = cuda::gate_scratch_bytes(tokens, experts, num_segments);
      scratch = empty({bytes}, ScalarType::Byte, logits);
    }
  }
  const GateArgs args{
      .logits = logits.const_data_ptr(),
      .bias = pointer_of(gating.bias),
      .valid = static_cast<const bool*>(pointer_of(valid)),
      .offsets = static_cast<const int64_t*>(pointer_of(segments)),
      .chunk_begin = chunks.begin.data(),
      .chunk_segment = chunks.segment.data(),
      .weights = weights.mutable_data_ptr(),
      .ids = ids.mutable_data_ptr<int32_t>(),
      .chunk_scores = sums.data(),
      .chunk_z = sums.data() + chunks.size() * experts,
      .chunk_counts = chunk_counts.data(),
      .scratch = scratch ? scratch->mutable_data_ptr() : nullptr,
      .score_sum = score_sum.mutable_data_ptr(),
      .counts = counts.mutable_data_ptr<int64_t>(),
      .z_sum = z_sum.mutable_data_ptr(),
      .tokens = tokens,
      .experts = experts,
      .top_k = top_k,
      .chunks = chunks.size(),
      .segments = num_segments,
      .num_groups = num_groups,
      .groups_kept = groups_kept,
      .scale = gating.scale,
      .dtype = dtype_of(logits),
      .score = score,
      .sum_two = group_score == GroupScore::sum2,
      .renormalize = gating.renormalize,
  };
  run(logits, [&](auto stream) { cuda::gate(args, stream); }, [&] {
    parallel(chunks.size(), chunks_of_a_thread(experts),
             [&](int64_t begin, int64_t end) { cpu::gate(args, begin, end); });
    cpu::gate_reduce(args);
  });
  return {weights, ids, score_sum, counts, z_sum};
}

Tensor gate_backward(const Tensor& logits, const Tensor& ids, const OptionalTensor& dweights,
                     const OptionalTensor& dscore_sum, const OptionalTensor& dz_sum,
                     std::string score, bool renormalize, double scale,
                     const OptionalTensor& segments) {
  const char* op = "gate_backward";
  check_tensor(op, "logits", logits, kFloats, {{"T"}, {"E"}});
  const int64_t tokens = logits.size(0), experts = logits.size(1);
  const ScalarType wide_dtype = wide(logits.scalar_type());
  check_tensor(op, "ids", ids, kInt32, {{"T", tokens}, {"K"}}, &logits);
  const int64_t top_k = ids.size(1);
  check(top_k >= 1 && top_k <= experts, op, ": ids must hold 1 to E=", experts, " columns, got ",
        top_k);
  const int64_t num_segments = check_segments(op, segments, logits);
  check_device_limits(op, logits, top_k);
  const Axis segment_axis{"S", num_segments};
  check_optional(op, "dweights", dweights, {wide_dtype}, {{"T", tokens}, {"K", top_k}}, logits);
  check_optional(op, "dscore_sum", dscore_sum, {wide_dtype}, {segment_axis, {"E", experts}},
                 logits);
  check_optional(op, "dz_sum", dz_sum, {wide_dtype}, {segment_axis}, logits);

  const Chunks chunks(tokens, segments, on_cuda(logits));
  Tensor dlogits = empty({tokens, experts}, logits.scalar_type(), logits);
  const GateBackwardArgs args{
      .logits = logits.const_data_ptr(),
      .ids = ids.const_data_ptr<int32_t>(),
      .dweights = pointer_of(dweights),
      .dscore_sum = pointer_of(dscore_sum),
      .dz_sum = pointer_of(dz_sum),
      .offsets = static_cast<const int64_t*>(pointer_of(segments)),
      .chunk_begin = chunks.begin.data(),
      .chunk_segment = chunks.segment.data(),
      .dlogits = dlogits.mutable_data_ptr(),
      .tokens = tokens,
      .experts = experts,
      .top_k = top_k,
      .segments = num_segments,
      .scale = scale,
      .dtype = dtype_of(logits),
      .score = named<GateScore>(op, "score", kGateScores, score),
      .renormalize = renormalize,
  };
  run(logits, [&](auto stream) { cuda::gate_backward(args, stream); }, [&] {
    parallel(chunks.size(), chunks_of_a_thread(experts),
             [&](int64_t begin, int64_t end) { cpu::gate_backward(args, begin, end); });
  });
  return dlogits;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(MOEKERNELS_OPS, m) {
  m.def(("_gate(" + Gating::schema() +
         "Tensor? segments, Tensor? valid) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
            .c_str());
  m.def(
      "_gate_backward(Tensor logits, Tensor ids, Tensor? dweights, Tensor? dscore_sum, "
      "Tensor? dz_sum, str score, bool renormalize, float scale, Tensor? segments) -> Tensor");
}

MOEKERNELS_IMPL(m) {
  m.impl("_gate", TORCH_BOX(Flat<&gate>::call));
  m.impl("_gate_backward", TORCH_BOX(&gate_backward));
}

}  // namespace moekernels::binding
