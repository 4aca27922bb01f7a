// Packing rows for an exchange between ranks, and putting what came in the order of experts.
#include "moekernels/all_to_all.h"

#include "device.h"

namespace moekernels::binding {
namespace {

// Elements of `dtype` that hold one weight, which is fp32 (fp64 beside fp64 rows).
int64_t weight_elements(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double ? 1 : 2;
}

Tensor pack(const Tensor& x, const OptionalTensor& weights, const Tensor& slot_of, int64_t top_k) {
  check_tensor("pack", "x", x, kFloats, {{"T"}, {"H"}});
  check_tensor("pack", "slot_of", slot_of, kInt32, {{"R"}}, &x);
  check(top_k >= 0, "pack: top_k must be at least 0, got ", top_k);
  const ScalarType dtype = x.scalar_type();
  const int64_t tokens = x.size(0), hidden = x.size(1), rows = slot_of.size(0);
  check_optional("pack", "weights", weights, {wide(dtype)}, {{"T", tokens}, {"K", top_k}}, x);
  const int64_t extra = weights ? weight_elements(dtype) : 0, size = size_of(dtype_of(x));
  Tensor message = empty_large({rows, hidden + extra}, dtype, x);
  const PackArgs args{
      .x = x.const_data_ptr(),
      .weights = weights ? weights->const_data_ptr() : nullptr,
      .slot_of = slot_of.const_data_ptr<int32_t>(),
      .message = message.mutable_data_ptr(),
      .tokens = tokens,
      .top_k = top_k,
      .row_bytes = hidden * size,
      .weight_bytes = extra * size,
  };
  run(x, [&](auto stream) { cuda::pack(args, rows, stream); }, [&] {
    parallel(rows, grain_of(2 * args.row_bytes),
             [&](int64_t begin, int64_t end) { cpu::pack(args, begin, end); });
  });
  return message;
}

// The runs that counts [P, e] describe, by expert, then by peer, and where each expert's rows
// begin.
struct RunTable {
  Tensor begin, source, offsets;
  int64_t size;

  // Counts on the CPU must add up to the rows. Those on a device are not read here, which would
  // wait for it: rows that they do not reach are left zero, and what they count too much is not
  // moved.
  RunTable(const char* op, const Tensor& counts, const Tensor& rows)
      : begin(rows), source(rows), offsets(rows), size(0) {
    check_tensor(op, "counts", counts, kInt64, {{"P"}, {"e"}});
    const int64_t peers = counts.size(0), experts = counts.size(1);
    if (!counts.is_cpu()) check_device(op, "counts", counts, rows);
    size = peers * experts;
    begin = empty({size + 1}, ScalarType::Long, rows);
    source = empty({size}, ScalarType::Long, rows);
    offsets = empty({experts + 1}, ScalarType::Long, rows);
    if (counts.is_cpu()) check_total(op, counts, rows);
    run(rows, [&](auto stream) { make(counts, rows, stream); }, [&] { make(counts); });
  }

  static void check_total(const char* op, const Tensor& counts, const Tensor& rows) {
    const int64_t* count = counts.const_data_ptr<int64_t>();
    int64_t total = 0;
    for (int64_t i = 0; i < counts.numel(); ++i) {
      check(count[i] >= 0, op, ": counts must not be negative, got ", count[i]);
      check(!__builtin_add_overflow(total, count[i], &total), op,
            ": counts add up to more rows than int64 counts, got ", shape_of(rows));
    }
    check(total == rows.size(0), op, ": counts add up to ", total, " rows, got ", shape_of(rows));
  }

  template <class S>
  void make(const Tensor& counts, const Tensor& rows, S stream) {
    const bool there = !counts.is_cpu() || rows.is_cpu();
    const Tensor on_device = there ? counts : torch::stable::to(counts, rows.device());
    cuda::make_runs({.counts = on_device.template const_data_ptr<int64_t>(),
                     .begin = begin.template mutable_data_ptr<int64_t>(),
                     .source = source.template mutable_data_ptr<int64_t>(),
                     .offsets = offsets.template mutable_data_ptr<int64_t>(),
                     .peers = counts.size(0),
                     .experts = counts.size(1),
                     .rows = rows.size(0)},
                    stream);
  }

  void make(const Tensor& counts) {
    const int64_t peers = counts.size(0), experts = counts.size(1);
    const int64_t* count = counts.const_data_ptr<int64_t>();
    int64_t* begins = begin.mutable_data_ptr<int64_t>();
    int64_t* sources = source.mutable_data_ptr<int64_t>();
    int64_t* starts = offsets.mutable_data_ptr<int64_t>();
    int64_t row = 0;
    for (int64_t p = 0; p < peers; ++p) {
      for (int64_t e = 0; e < experts; ++e) {
        sources[e * peers + p] = row;
        row += count[p * experts + e];
      }
    }
    row = 0;
    for (int64_t e = 0; e < experts; ++e) {
      starts[e] = row;
      for (int64_t p = 0; p < peers; ++p) {
        begins[e * peers + p] = row;
        row += count[p * experts + e];
      }
    }
    begins[size] = starts[experts] = row;
  }

  Runs runs() const {
    return {begin.const_data_ptr<int64_t>(), source.const_data_ptr<int64_t>(), size};
  }
};

std::tuple<Tensor, Tensor, Tensor> regroup(const Tensor& message, const Tensor& counts,
                                           int64_t width) {
  check_tensor("regroup", "message", message, kFloats, {{"R"}, {"H+w"}});
  const ScalarType dtype = message.scalar_type();
  const int64_t rows = message.size(0), extra = message.size(1) - width,
                size = size_of(dtype_of(message));
  check(width >= 0 && (extra == 0 || extra == weight_elements(dtype)), "regroup: message ",
        shape_of(message), " must hold width=", width, " elements a row, or ",
        width + weight_elements(dtype), " with weights");
  const RunTable table("regroup", counts, message);
  Tensor out = empty_large({rows, width}, dtype, message);
  Tensor weights = empty({extra ? rows : 0}, wide(dtype), message);
  const RegroupArgs args{
      .message = message.const_data_ptr(),
      .rows = out.mutable_data_ptr(),
      .weights = extra ? weights.mutable_data_ptr() : nullptr,
      .row_bytes = width * size,
      .weight_bytes = extra * size,
      .num_rows = rows,
      .runs = table.runs(),
  };
  run(message, [&](auto stream) { cuda::regroup(args, stream); }, [&] {
    parallel(rows, grain_of(2 * args.row_bytes),
             [&](int64_t begin, int64_t end) { cpu::regroup(args, begin, end); });
  });
  return {out, weights, table.offsets};
}

Tensor ungroup(const Tensor& rows, const Tensor& counts, const OptionalTensor& weights) {
  check_tensor("ungroup", "rows", rows, kFloats, {{"R"}, {"H"}});
  const ScalarType dtype = rows.scalar_type();
  const int64_t num_rows = rows.size(0), hidden = rows.size(1), size = size_of(dtype_of(rows));
  check_optional("ungroup", "weights", weights, {wide(dtype)}, {{"R", num_rows}}, rows);
  const RunTable table("ungroup", counts, rows);
  const int64_t extra = weights ? weight_elements(dtype) : 0;
  Tensor message = empty_large({num_rows, hidden + extra}, dtype, rows);
  const UngroupArgs args{
      .rows = rows.const_data_ptr(),
      .weights = weights ? weights->const_data_ptr() : nullptr,
      .message = message.mutable_data_ptr(),
      .row_bytes = hidden * size,
      .weight_bytes = extra * size,
      .num_rows = num_rows,
      .runs = table.runs(),
  };
  run(rows, [&](auto stream) { cuda::ungroup(args, stream); }, [&] {
    parallel(num_rows, grain_of(2 * args.row_bytes),
             [&](int64_t begin, int64_t end) { cpu::ungroup(args, begin, end); });
  });
  return message;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(MOEKERNELS_OPS, m) {
  m.def("_pack(Tensor x, Tensor? weights, Tensor slot_of, SymInt top_k) -> Tensor");
  m.def("_regroup(Tensor message, Tensor counts, SymInt width) -> (Tensor, Tensor, Tensor)");
  m.def("_ungroup(Tensor rows, Tensor counts, Tensor? weights) -> Tensor");
}

MOEKERNELS_IMPL(m) {
  m.impl("_pack", TORCH_BOX(&pack));
  m.impl("_regroup", TORCH_BOX(&regroup));
  m.impl("_ungroup", TORCH_BOX(&ungroup));
}

}  // namespace moekernels::binding
