// The exchange through memory that ranks share. Addresses of the peers' slabs are plain numbers.
#include "moekernels/exchange.h"

#include "slabs.h"

namespace moekernels::binding {
namespace {

int64_t exchange_bytes(Numbers shape) {
  return Slab{nullptr, shape_from("exchange_bytes", shape)}.bytes();
}

// What a word of a slab counts, for a wait that gave up: kind, slot, expert or peer; see
// ops/exchange.py.
Numbers exchange_word(Numbers shape, int64_t at) {
  const SlabShape s = shape_from("exchange_word", shape);
  const Slab slab{nullptr, s};
  const auto is = [&](const uint32_t* word) { return reinterpret_cast<int64_t>(word) == at; };
  for (int64_t p = 0; p < s.peers; ++p) {
    if (is(slab.ready(p))) return {0, 0, p};
  }
  for (int64_t slot = 0; slot < s.slots; ++slot) {
    for (int64_t x = 0; x < s.experts; ++x) {
      if (is(slab.arrived(slot, x))) return {1, slot, x};
    }
    for (int64_t block = 0; block < slab.home_blocks(); ++block) {
      if (is(slab.returned(slot, block))) return {2, slot, block * kHomeRows};
    }
    for (int64_t p = 0; p < s.peers; ++p) {
      if (is(slab.freed(slot, p, false))) return {3, slot, p};
      if (is(slab.freed(slot, p, true))) return {4, slot, p};
    }
  }
  check(false, "exchange_word: byte ", at, " of a slab is no word that ranks wait for");
  return {};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> exchange_counts(
    const Tensor& counts, const Tensor& slab, Numbers addresses, int64_t rank, Numbers shape,
    int64_t patience, const OptionalTensor& stuck, Numbers record, int64_t room,
    const OptionalTensor& most) {
  const char* op = "exchange_counts";
  CountsArgs args{};
  args.peers = slabs_from(op, slab, addresses, rank, shape, patience, stuck, record);
  const SlabShape& s = args.peers.shape;
  const int64_t all = s.peers * s.experts;
  check_tensor(op, "counts", counts, kInt64, {{"P*e", all}}, &slab);
  check(room >= 0, op, ": room must not be negative, got ", room);
  check_optional(op, "most", most, kInt64, {{"1", 1}}, slab);
  Tensor came = empty({s.peers, s.experts}, ScalarType::Long, slab);
  Tensor offsets = empty({s.experts + 1}, ScalarType::Long, slab);
  Tensor held = empty({s.experts + 1}, ScalarType::Long, slab);
  Tensor out = empty({all + 1, 2}, ScalarType::Long, slab);
  Tensor back = empty({all + 1, 2}, ScalarType::Long, slab);
  Tensor needed = empty({2}, ScalarType::Long, slab);
  args.counts = counts.const_data_ptr<int64_t>();
  args.came = came.mutable_data_ptr<int64_t>();
  args.offsets = offsets.mutable_data_ptr<int64_t>();
  args.room = room;
  args.held = held.mutable_data_ptr<int64_t>();
  args.out = static_cast<Run*>(out.mutable_data_ptr());
  args.back = static_cast<Run*>(back.mutable_data_ptr());
  args.needed = needed.mutable_data_ptr<int64_t>();
  if (most) args.most = const_cast<int64_t*>(most->const_data_ptr<int64_t>());
  run(slab, [&](auto stream) { cuda::gather_counts(args, stream); },
      [&] { cpu::gather_counts(args); });
  return {came, offsets, held, out, back, needed};
}

void exchange_send(const Tensor& rows, const OptionalTensor& weights, const OptionalTensor& slot_of,
                   int64_t top_k, const Tensor& runs, const Tensor& slab, Numbers addresses,
                   int64_t rank, Numbers shape, int64_t patience, const OptionalTensor& stuck,
                   Numbers record, int64_t slot, bool back) {
  const char* op = "exchange_send";
  SendArgs args{};
  args.peers = slabs_from(op, slab, addresses, rank, shape, patience, stuck, record);
  check_tensor(op, "rows", rows, kFloats, {{slot_of ? "T" : "R"}, {"H"}}, &slab);
  check(top_k >= 1, op, ": top_k must be at least 1, got ", top_k);
  check_optional(op, "slot_of", slot_of, kInt32, {{"R"}}, slab);
  const ScalarType dtype = rows.scalar_type();
  if (slot_of) {
    check_optional(op, "weights", weights, {wide(dtype)}, {{"T", rows.size(0)}, {"K", top_k}},
                   slab);
    args.slot_of = slot_of->const_data_ptr<int32_t>();
  } else {
    check_optional(op, "weights", weights, {wide(dtype)}, {{"R", rows.size(0)}}, slab);
  }
  args.rows = rows.const_data_ptr();
  args.weights = pointer_of(weights);
  args.top_k = top_k;
  args.slots_of = rows.size(0) * top_k;
  args.runs = runs_from(op, runs, args.peers.shape, slab);
  args.num_runs = runs.size(0) - 1;
  args.num_rows = slot_of ? slot_of->size(0) : rows.size(0);
  args.row_bytes = rows.size(1) * size_of(dtype_of(rows));
  args.weight_bytes = weights ? (dtype == ScalarType::Double ? 8 : 4) : 0;
  args.slot = slot;
  args.back = back;
  check_slot(op, args.peers.shape, slot, args.row_bytes);
  run(slab, [&](auto stream) { cuda::send_rows(args, stream); }, [&] { cpu::send_rows(args); });
}

std::tuple<Tensor, Tensor> exchange_receive(const Tensor& like, const Tensor& offsets,
                                            const Tensor& slab, Numbers addresses, int64_t rank,
                                            Numbers shape, int64_t patience,
                                            const OptionalTensor& stuck, Numbers record,
                                            int64_t slot, bool back, int64_t num_rows,
                                            bool weighted, int64_t units) {
  const char* op = "exchange_receive";
  ReceiveArgs args{};
  args.peers = slabs_from(op, slab, addresses, rank, shape, patience, stuck, record);
  const SlabShape& s = args.peers.shape;
  check_tensor(op, "like", like, kFloats, {{"R"}, {"H"}}, &slab);
  check(num_rows >= 0, op, ": num_rows must not be negative, got ", num_rows);
  check(units >= 1, op, ": units must be at least 1, got ", units);
  args.units = units;
  const ScalarType dtype = like.scalar_type();
  // On the way back what is awaited is the end of the own runs.
  args.total = back ? &runs_from(op, offsets, s, slab)[s.peers * s.experts].begin : nullptr;
  if (!back) {
    check_tensor(op, "offsets", offsets, kInt64, {{"e+1", s.experts + 1}}, &slab);
    args.offsets = offsets.const_data_ptr<int64_t>();
    args.total = args.offsets + s.experts;
  }
  Tensor rows = empty_large({num_rows, like.size(1)}, dtype, slab);
  Tensor weights = empty({weighted ? num_rows : 0}, wide(dtype), slab);
  args.rows = rows.mutable_data_ptr();
  args.weights = weighted ? weights.mutable_data_ptr() : nullptr;
  args.num_rows = num_rows;
  args.row_bytes = like.size(1) * size_of(dtype_of(like));
  args.weight_bytes = weighted ? (dtype == ScalarType::Double ? 8 : 4) : 0;
  args.slot = slot;
  args.back = back;
  check_slot(op, s, slot, args.row_bytes);
  run(slab, [&](auto stream) { cuda::receive_rows(args, stream); },
      [&] { cpu::receive_rows(args); });
  return {rows, weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(MOEKERNELS_OPS, m) {
  m.def("_exchange_bytes(int[] shape) -> int");
  m.def("_exchange_word(int[] shape, int at) -> int[]");
  m.def(
      "_exchange_counts(Tensor counts, Tensor(a!) slab, int[] addresses, int rank, int[] shape, "
      "int patience, Tensor? stuck, int[] record, int room, Tensor(b!)? most) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "_exchange_send(Tensor rows, Tensor? weights, Tensor? slot_of, int top_k, Tensor runs, "
      "Tensor(a!) slab, int[] addresses, int rank, int[] shape, int patience, Tensor? stuck, int[] record, "
      "int slot, bool back) -> ()");
  m.def(
      "_exchange_receive(Tensor like, Tensor offsets, Tensor(a!) slab, int[] addresses, int rank, "
      "int[] shape, int patience, Tensor? stuck, int[] record, int slot, bool back, int num_rows, "
      "bool weighted, int units=1) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(MOEKERNELS_OPS, CompositeExplicitAutograd, library) {
  library.impl("_exchange_bytes", TORCH_BOX(&exchange_bytes));
  library.impl("_exchange_word", TORCH_BOX(&exchange_word));
}

MOEKERNELS_IMPL(m) {
  m.impl("_exchange_counts", TORCH_BOX(&exchange_counts));
  m.impl("_exchange_send", TORCH_BOX(&exchange_send));
  m.impl("_exchange_receive", TORCH_BOX(&exchange_receive));
}

}  // namespace moekernels::binding
