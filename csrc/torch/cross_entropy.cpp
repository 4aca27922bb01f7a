// Cross-entropy over a shard of a vocabulary, on the CPU: checks, memory, launch.
#include "moekernels/cross_entropy.h"

#include "device.h"

namespace moekernels::binding {
namespace {

constexpr std::initializer_list<ScalarType> kWide = {ScalarType::Float, ScalarType::Double};

CrossEntropyArgs checked(const Tensor& logits, const Tensor& labels, int64_t first) {
  const char* op = "cross_entropy";
  check_tensor(op, "logits", logits, kWide, {{"C"}, {"V"}});
  check_tensor(op, "labels", labels, kInt64, {{"C", logits.size(0)}}, &logits);
  check(first >= 0, op, ": first must not be negative, got ", first);
  CrossEntropyArgs args{};
  args.logits = logits.mutable_data_ptr();
  args.labels = labels.const_data_ptr<int64_t>();
  args.first = first;
  args.tokens = logits.size(0);
  args.width = logits.size(1);
  args.dtype = dtype_of(logits);
  return args;
}

int64_t grain(const CrossEntropyArgs& args) {
  return grain_of(4 * args.width * size_of(args.dtype));
}

Tensor cross_entropy_sums_(Tensor logits, const Tensor& labels, int64_t first) {
  CrossEntropyArgs args = checked(logits, labels, first);
  Tensor stats = empty({3, args.tokens}, logits.scalar_type(), logits);
  args.stats = stats.mutable_data_ptr();
  parallel(args.tokens, grain(args),
           [&](int64_t begin, int64_t end) { cpu::cross_entropy_sums(args, begin, end); });
  return stats;
}

Tensor cross_entropy_losses_(Tensor logits, const Tensor& labels, int64_t first,
                             const Tensor& shards, int64_t rank) {
  const char* op = "cross_entropy";
  CrossEntropyArgs args = checked(logits, labels, first);
  check_tensor(op, "shards", shards, {logits.scalar_type()}, {{"P"}, {"3", 3}, {"C", args.tokens}},
               &logits);
  args.peers = shards.size(0);
  check(rank >= 0 && rank < args.peers, op, ": rank must be in [0, P=", args.peers, "), got ",
        rank);
  args.rank = rank;
  args.shards = shards.const_data_ptr();
  Tensor losses = empty({args.tokens}, logits.scalar_type(), logits);
  args.losses = losses.mutable_data_ptr();
  parallel(args.tokens, grain(args),
           [&](int64_t begin, int64_t end) { cpu::cross_entropy_losses(args, begin, end); });
  return losses;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(MOEKERNELS_OPS, m) {
  m.def("_cross_entropy_sums_(Tensor(a!) logits, Tensor labels, int first) -> Tensor");
  m.def(
      "_cross_entropy_losses_(Tensor(a!) logits, Tensor labels, int first, Tensor shards, "
      "int rank) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(MOEKERNELS_OPS, CPU, m) {
  m.impl("_cross_entropy_sums_", TORCH_BOX(&cross_entropy_sums_));
  m.impl("_cross_entropy_losses_", TORCH_BOX(&cross_entropy_losses_));
}

}  // namespace moekernels::binding
