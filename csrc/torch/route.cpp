// The choices of all tokens, sorted by expert: checks, the cut into chunks, memory, launch.
#include "moekernels/route.h"

#include <algorithm>
#include <limits>

#include "device.h"

namespace moekernels::binding {
namespace {

constexpr int64_t kSlotsOfChunk = 16384;  // less is not worth a second thread

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> route(const Tensor& ids, int64_t experts,
                                                         const OptionalTensor& weights,
                                                         int64_t capacity, int64_t alignment) {
  check_tensor("route", "ids", ids, kIds, {{"T"}, {"K"}});
  const int64_t tokens = ids.size(0), top_k = ids.size(1), slots = tokens * top_k;
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  check(experts >= 1, "route: num_experts must be at least 1, got ", experts);
  check(alignment >= 1, "route: alignment must be at least 1, got ", alignment);
  check(experts <= kMost, "route: num_experts must fit int32, got ", experts);
  check(alignment <= kMost, "route: alignment must fit int32, got ", alignment);
  check(slots <= kMost, "route: ids hold T*K=", slots, " choices, which must fit int32");
  const int64_t rows = slots + experts * (alignment - 1);
  check(rows <= kMost, "route: T*K + E*(alignment-1) must fit int32, got ", rows,
        " with num_experts=", experts, " and alignment=", alignment);
  if (weights) {
    check_tensor("route", "weights", *weights, {ScalarType::Float, ScalarType::Double},
                 {{"T", tokens}, {"K", top_k}}, &ids);
  }
  const bool by_weight = weights && capacity >= 0;
  // The device's scratch comes from torch's allocator, the CPU's from the heap; its size depends on
  // shapes alone.
  int64_t chunks = 1, chunk_slots = slots, least_rows = 1;
  if constexpr (kWithCuda) {
    if (on_cuda(ids)) {
      chunk_slots = cuda::route_chunk_slots(slots, experts);
      chunks = (slots + chunk_slots - 1) / chunk_slots;
      least_rows = cuda::kRouteBlocks;
    }
  }
  if (!on_cuda(ids) && !by_weight) {
    const int64_t wanted = (slots + kSlotsOfChunk - 1) / kSlotsOfChunk;
    chunks = std::clamp<int64_t>(wanted, 1, torch::stable::get_num_threads());
  }
  Tensor counts = empty({experts}, ScalarType::Long, ids);
  Tensor offsets = empty({experts + 1}, ScalarType::Long, ids);
  Tensor row_of = empty({tokens, top_k}, ScalarType::Int, ids);
  Tensor token_of = empty({rows}, ScalarType::Int, ids);
  Tensor slot_of = empty({rows}, ScalarType::Int, ids);
  Tensor begins = empty({std::max(chunks, least_rows) * experts}, ScalarType::Int, ids);
  Tensor order = empty({by_weight ? slots + experts + 2 : 0}, ScalarType::Int, ids);
  int32_t* order_data = order.mutable_data_ptr<int32_t>();
  const RouteArgs args{
      .ids = ids.const_data_ptr(),
      .weights = weights ? weights->const_data_ptr() : nullptr,
      .counts = counts.mutable_data_ptr<int64_t>(),
      .offsets = offsets.mutable_data_ptr<int64_t>(),
      .row_of = row_of.mutable_data_ptr<int32_t>(),
      .token_of = token_of.mutable_data_ptr<int32_t>(),
      .slot_of = slot_of.mutable_data_ptr<int32_t>(),
      .begins = begins.mutable_data_ptr<int32_t>(),
      .order = by_weight ? order_data : nullptr,
      .order_begins = by_weight ? order_data + slots + 1 : nullptr,
      .slots = slots,
      .top_k = top_k,
      .experts = experts,
      .num_rows = rows,
      .chunks = chunks,
      .alignment = alignment,
      .chunk_slots = chunk_slots,
      .capacity = capacity,
      .wide_ids = ids.scalar_type() == ScalarType::Long,
      .wide_weights = weights && weights->scalar_type() == ScalarType::Double,
  };
  run(ids, [&](auto stream) { cuda::route(args, stream); }, [&] {
    parallel(chunks, 1, [&](int64_t begin, int64_t end) { cpu::route_count(args, begin, end); });
    cpu::route_scan(args);
    parallel(chunks, 1, [&](int64_t begin, int64_t end) { cpu::route_place(args, begin, end); });
  });
  return {counts, offsets, row_of, token_of, slot_of};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(MOEKERNELS_OPS, m) {
  m.def(
      "_route(Tensor ids, SymInt num_experts, Tensor? weights, SymInt capacity, SymInt alignment)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

MOEKERNELS_IMPL(m) { m.impl("_route", TORCH_BOX(&route)); }

}  // namespace moekernels::binding
