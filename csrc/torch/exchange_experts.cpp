// The experts' FFN between the two ways of an exchange: its first product reads rows that are still
// on their way, its last brings the results home. Where no product of the device does that (see
// moekernels/exchange.h) the rows are received before, and sent after: the same bits.
#include "ffn.h"
#include "slabs.h"

namespace moekernels::binding {
namespace {

// What every op here takes of the slabs, in the order of ops/exchange.py's Slabs, and a slot.
struct Way {
  const char* op;
  PeerSlabs peers;
  int64_t slot;

  char* rows(bool back) const { return peers.own().rows(slot, back); }
};

Way way_of(const char* op, const Tensor& slab, const Numbers& addresses, int64_t rank,
           const Numbers& shape, int64_t patience, const OptionalTensor& stuck, Numbers record,
           int64_t slot, int64_t row_bytes) {
  const Way way{op, slabs_from(op, slab, addresses, rank, shape, patience, stuck, record), slot};
  check_slot(op, way.peers.shape, slot, row_bytes);
  return way;
}

// A product of what comes reads the slot as it lies.
void check_room(const Way& way, int64_t num_rows) {
  check(num_rows >= 0 && num_rows <= way.peers.shape.rows, way.op,
        ": num_rows must be 0 to the slab's ", way.peers.shape.rows, " rows, got ", num_rows);
}

int64_t bytes_of_row(const Tensor& rows) { return rows.size(1) * size_of(dtype_of(rows)); }

ReceiveArgs receiving(const Way& way, const Tensor& rows, const Tensor* weights,
                      const Tensor& coming) {
  const int64_t experts = way.peers.shape.experts;
  check_tensor(way.op, "coming", coming, kInt64, {{"e+1", experts + 1}}, &rows);
  ReceiveArgs args{};
  args.peers = way.peers;
  args.offsets = coming.const_data_ptr<int64_t>();
  args.total = args.offsets + experts;
  args.rows = rows.mutable_data_ptr();
  args.weights = weights == nullptr ? nullptr : weights->mutable_data_ptr();
  args.num_rows = rows.size(0);
  args.row_bytes = bytes_of_row(rows);
  args.weight_bytes = weights == nullptr ? 0 : size_of(dtype_of(*weights));
  args.slot = way.slot;
  args.back = false;
  return args;
}

// Of `num_rows` rows [*, H] like `like`; what a product has sent is left out.
SendArgs sending(const Way& way, const Run* runs, const Tensor& like, int64_t num_rows,
                 const OptionalTensor& weights) {
  SendArgs args{};
  args.peers = way.peers;
  args.weights = pointer_of(weights);
  args.top_k = 1;
  args.slots_of = num_rows;
  args.runs = runs;
  args.num_runs = way.peers.shape.peers * way.peers.shape.experts;
  args.num_rows = num_rows;
  args.row_bytes = bytes_of_row(like);
  args.weight_bytes = weights ? size_of(dtype_of(*weights)) : 0;
  args.slot = way.slot;
  args.back = true;
  args.units = home_units(like.size(1));
  return args;
}

// Rows [R, H] and weights [R] as they came, h [R, G] (empty unless `keep_h`), a [R, F].
std::tuple<Tensor, Tensor, Tensor, Tensor> exchange_up(const Ffn& given, const Tensor& slab,
                                                       Numbers addresses, int64_t rank,
                                                       Numbers shape, int64_t patience,
                                                       const OptionalTensor& stuck, Numbers record,
                                                       int64_t slot, const Tensor& coming,
                                                       int64_t num_rows, bool keep_h) {
  const char* op = "exchange_up";
  const Tensor& like = given.x;
  check_tensor(op, "x", like, kFloats, {{"R"}, {"H"}}, &slab);
  check(!given.token_of && !given.weights, op, ": rows that come have weights and places already");
  const ScalarType dtype = like.scalar_type();
  const Way way =
      way_of(op, slab, addresses, rank, shape, patience, stuck, record, slot, bytes_of_row(like));
  check_room(way, num_rows);
  Ffn ffn = given;
  ffn.x = empty_large({num_rows, like.size(1)}, dtype, slab);
  const Tensor weights = empty({num_rows}, wide(dtype), slab);
  ffn.weights = weights;
  const ReceiveArgs receive = receiving(way, ffn.x, &weights, coming);
  const ExpertsArgs of = checked(ffn);
  Tensor h = empty_large({keep_h ? num_rows : 0, h_width(of)}, dtype, slab);
  Tensor a = empty_large({num_rows, of.ffn}, dtype, slab);
  ExpertsUpArgs up{
      .of = of, .h = keep_h ? h.mutable_data_ptr() : nullptr, .a = a.mutable_data_ptr()};
  run(slab, [&](auto stream) {
    up.of.x = way.rows(false);
    const Arriving from{way.peers, slot, receive.offsets};
    const bool early = cuda::experts_up(up, from, stream);
    cuda::receive_rows(receive, stream);
    if (early) return;
    up.of.x = of.x;
    cuda::experts_up(up, stream);
  }, [&] {
    cpu::receive_rows(receive);
    run_up(up);
  });
  return {ffn.x, weights, h, a};
}

// y of the FFN, straight to its owners.
void exchange_down(const Ffn& ffn, const Tensor& slab, Numbers addresses, int64_t rank,
                   Numbers shape, int64_t patience, const OptionalTensor& stuck, Numbers record,
                   int64_t slot, const Tensor& runs, const Tensor& a) {
  const char* op = "exchange_down";
  const ExpertsArgs of = checked(ffn);
  check_tensor(op, "a", a, {ffn.x.scalar_type()}, {{"R", of.num_rows}, {"F", of.ffn}}, &ffn.x);
  const Way way =
      way_of(op, slab, addresses, rank, shape, patience, stuck, record, slot, bytes_of_row(ffn.x));
  SendArgs send = sending(way, runs_from(op, runs, way.peers.shape, slab), ffn.x, of.num_rows, {});
  ExpertsDownArgs down{.of = of, .a = a.const_data_ptr(), .y = nullptr};
  const auto make_y = [&] {
    const Tensor y = empty_large({of.num_rows, of.hidden}, ffn.x.scalar_type(), slab);
    send.rows = down.y = y.mutable_data_ptr();
    return y;
  };
  run(slab, [&](auto stream) {
    const Going home{way.peers, slot, send.runs, nullptr, static_cast<int32_t>(of.hidden)};
    Tensor y;
    if (cuda::experts_down(down, home, stream)) {
      send.first = of.num_rows;
    } else {
      y = make_y();
      cuda::experts_down(down, stream);
    }
    cuda::send_rows(send, stream);
  }, [&] {
    const Tensor y = make_y();
    with_workers(of.num_rows * of.hidden * of.ffn, [&](int64_t worker, int64_t workers) {
      cpu::experts_down(down, worker, workers);
    });
    cpu::send_rows(send);
  });
}

// dy [R, H] as it came, and what experts_dact gives for it.
std::tuple<Tensor, Tensor, Tensor, Tensor> exchange_dact(
    const Ffn& ffn, const Tensor& slab, Numbers addresses, int64_t rank, Numbers shape,
    int64_t patience, const OptionalTensor& stuck, Numbers record, int64_t slot,
    const Tensor& coming, const Tensor& h, bool want_weighted_a, bool want_dweights) {
  const char* op = "exchange_dact";
  const Tensor& x = ffn.x;
  check_tensor(op, "x", x, kFloats, {{"R"}, {"H"}}, &slab);
  const Way way =
      way_of(op, slab, addresses, rank, shape, patience, stuck, record, slot, bytes_of_row(x));
  check_room(way, x.size(0));
  const Tensor dy = empty_large({x.size(0), x.size(1)}, x.scalar_type(), slab);
  const ReceiveArgs receive = receiving(way, dy, nullptr, coming);
  if (!on_cuda(x)) cpu::receive_rows(receive);
  auto [dh, weighted_a, dweights] =
      dact_of(ffn, dy, h, want_weighted_a, want_dweights, [&](ExpertsDActArgs dact, auto stream) {
    dact.dy = way.rows(false);
    const Arriving from{way.peers, slot, receive.offsets};
    const bool early = cuda::experts_dact(dact, from, stream);
    cuda::receive_rows(receive, stream);
    if (early) return;
    dact.dy = receive.rows;
    cuda::experts_dact(dact, stream);
  });
  return {dy, dh, weighted_a, dweights};
}

// rows w, and beside them weights, straight to their owners: x's gradient and that of its weights.
void exchange_product(const Tensor& rows, const Tensor& w, const Tensor& offsets, bool transposed,
                      bool tf32, const OptionalTensor& weights, const Tensor& slab,
                      Numbers addresses, int64_t rank, Numbers shape, int64_t patience,
                      const OptionalTensor& stuck, Numbers record, int64_t slot,
                      const Tensor& runs) {
  const char* op = "exchange_product";
  check_tensor(op, "rows", rows, kFloats, {{"R"}, {"I"}}, &slab);
  const ScalarType dtype = rows.scalar_type();
  const int64_t num_rows = rows.size(0), in = rows.size(1);
  if (transposed) {
    check_tensor(op, "w", w, {dtype}, {{"E"}, {"I", in}, {"O"}}, &rows);
  } else {
    check_tensor(op, "w", w, {dtype}, {{"E"}, {"O"}, {"I", in}}, &rows);
  }
  check_offsets(op, offsets, w.size(0), num_rows, rows);
  check_optional(op, "weights", weights, {wide(dtype)}, {{"R", num_rows}}, rows);
  const int64_t width = w.size(transposed ? 2 : 1);
  const Way way = way_of(op, slab, addresses, rank, shape, patience, stuck, record, slot,
                         width * size_of(dtype_of(rows)));
  const Tensor like = empty({0, width}, dtype, slab);
  SendArgs send = sending(way, runs_from(op, runs, way.peers.shape, slab), like, num_rows, weights);
  GroupedGemmArgs args{
      .dtype = dtype_of(rows),
      .rows = rows.const_data_ptr(),
      .w = w.const_data_ptr(),
      .offsets = offsets.const_data_ptr<int64_t>(),
      .out = nullptr,
      .num_rows = num_rows,
      .in = in,
      .out_width = width,
      .experts = w.size(0),
      .transposed = transposed,
      .tf32 = tf32,
  };
  const auto make_out = [&] {
    const Tensor out = empty_large({num_rows, width}, dtype, slab);
    send.rows = args.out = out.mutable_data_ptr();
    return out;
  };
  run(slab, [&](auto stream) {
    const Going home{way.peers, slot, send.runs, static_cast<const float*>(send.weights),
                     static_cast<int32_t>(width)};
    Tensor out;
    if (cuda::grouped_gemm(args, home, stream)) {
      send.first = num_rows;
    } else {
      out = make_out();
      cuda::grouped_gemm(args, stream);
    }
    cuda::send_rows(send, stream);
  }, [&] {
    const Tensor out = make_out();
    with_workers(num_rows * in * width, [&](int64_t worker, int64_t workers) {
      cpu::grouped_gemm(args, worker, workers);
    });
    cpu::send_rows(send);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(MOEKERNELS_OPS, m) {
  const std::string ffn = Ffn::schema();
  const std::string way =
      "Tensor(a!) slab, int[] addresses, int rank, int[] shape, int patience, Tensor? stuck, int[] record, "
      "int slot, ";
  m.def(("_exchange_up(" + ffn + way +
         "Tensor coming, int num_rows, bool keep_h) -> (Tensor, Tensor, Tensor, Tensor)")
            .c_str());
  m.def(("_exchange_down(" + ffn + way + "Tensor runs, Tensor a) -> ()").c_str());
  m.def(("_exchange_dact(" + ffn + way +
         "Tensor coming, Tensor h, bool want_weighted_a, bool want_dweights) "
         "-> (Tensor, Tensor, Tensor, Tensor)")
            .c_str());
  m.def(("_exchange_product(Tensor rows, Tensor w, Tensor offsets, bool transposed, bool tf32, "
         "Tensor? weights, " +
         way + "Tensor runs) -> ()")
            .c_str());
}

MOEKERNELS_IMPL(m) {
  m.impl("_exchange_up", TORCH_BOX(Flat<&exchange_up>::call));
  m.impl("_exchange_down", TORCH_BOX(Flat<&exchange_down>::call));
  m.impl("_exchange_dact", TORCH_BOX(Flat<&exchange_dact>::call));
  m.impl("_exchange_product", TORCH_BOX(&exchange_product));
}

}  // namespace moekernels::binding
