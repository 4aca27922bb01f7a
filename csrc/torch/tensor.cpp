// Checks and their words, and memory that says how much was asked for.
#include "tensor.h"

#ifdef MOEKERNELS_EMULATED
#include <vector>

#include "emulated.h"

namespace {
bool keeping = false;
std::vector<torch::stable::Tensor> kept;  // for launches that run later
}  // namespace

void moekernels_emulate_keep(int keep) {
  keeping = keep != 0;
  if (!keeping) kept.clear();
}
#endif

namespace moekernels::binding {

const char* name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Double: return "float64";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Float8_e4m3fn: return "float8_e4m3fn";
    default: return torch::headeronly::toString(dtype);
  }
}

std::string shape_of(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) {
    text += (i ? ", " : "") + std::to_string(t.size(i));
  }
  return text + "]";
}

std::string device_of(const Tensor& t) {
  return t.is_cpu()    ? "cpu"
         : t.is_cuda() ? "cuda:" + std::to_string(t.get_device())
                       : "another device";
}

void check_device(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  const bool on_cpu = t.is_cpu();
  if (on_cpu == like.is_cpu() && (on_cpu || t.get_device() == like.get_device())) return;
  check(false, op, ": ", name, " must be on ", device_of(like), " like the first argument, got ",
        device_of(t));
}

void check_tensor(const char* op, const char* name, const Tensor& t,
                  std::initializer_list<ScalarType> dtypes, std::initializer_list<Axis> shape,
                  const Tensor* like) {
  bool ok = t.dim() == static_cast<int64_t>(shape.size());
  if (ok) {
    int64_t i = 0;
    for (const Axis& axis : shape) {
      ok = ok && (axis.length < 0 || t.size(i) == axis.length);
      ++i;
    }
  }
  const ScalarType dtype = t.scalar_type();
  bool dtype_ok = false;
  for (ScalarType d : dtypes) dtype_ok = dtype_ok || dtype == d;
  if (!ok || !dtype_ok) {
    std::string wanted;
    for (ScalarType d : dtypes) wanted += (wanted.empty() ? "" : "|") + std::string(name_of(d));
    wanted += " [";
    bool first = true;
    for (const Axis& axis : shape) {
      wanted += first ? "" : ", ";
      wanted += axis.letter;
      if (axis.length >= 0) wanted += "=" + std::to_string(axis.length);
      first = false;
    }
    check(false, op, ": ", name, " must be ", wanted, "], got ", name_of(dtype), " ", shape_of(t));
  }
  if (!t.is_contiguous()) {
    std::string strides = "[";
    for (int64_t i = 0; i < t.dim(); ++i) {
      strides += (i ? ", " : "") + std::to_string(t.stride(i));
    }
    check(false, op, ": ", name, " must be contiguous, got strides ", strides, "]");
  }
  check(dtype != ScalarType::Double || !on_cuda(t), op, ": ", name,
        " is float64, which the CPU alone computes; give float32, bfloat16 or float16 on CUDA");
  if (like != nullptr) check_device(op, name, t, *like);
}

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: return DType::f64;
  }
}

// By torch's C function, as the stable ABI's own new_empty looks its op up by name in every call.
Tensor empty(std::initializer_list<int64_t> shape, ScalarType dtype, const Tensor& like) {
  constexpr size_t kMostAxes = 8;  // more than any op makes
  int64_t strides[kMostAxes] = {};
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = stride;
    const int64_t size = shape.begin()[i];
    stride *= size > 0 ? size : 1;
  }
  int32_t kind = 0, index = 0;
  AtenTensorHandle made = nullptr;
  aoti_torch_get_device_type(like.get(), &kind);
  aoti_torch_get_device_index(like.get(), &index);
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  if (aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.begin(), strides, code,
                               kind, index, &made) != 0) {  // that it failed, not why
    std::string sizes;
    for (int64_t size : shape) sizes += (sizes.empty() ? "" : ", ") + std::to_string(size);
    check(false, "moekernels: no memory on ", device_of(like), " for ", name_of(dtype), " [", sizes,
          "]");
  }
  Tensor t(made);
#ifdef MOEKERNELS_EMULATED
  emulated::note_array(t.const_data_ptr(), t.numel() * t.element_size());
  if (keeping) kept.push_back(t);
#endif
  return t;
}

}  // namespace moekernels::binding
