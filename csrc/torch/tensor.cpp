// Checks and their words, and memory that says how much was asked for.
#include "tensor.h"

#ifdef MOEKERNELS_EMULATED
#include "emulated.h"
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
  check(t.is_cpu() == like.is_cpu() && (t.is_cpu() || t.get_device() == like.get_device()), op,
        ": ", name, " must be on ", device_of(like), " like the first argument, got ",
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
  bool dtype_ok = false;
  for (ScalarType d : dtypes) dtype_ok = dtype_ok || t.scalar_type() == d;
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
    check(false, op, ": ", name, " must be ", wanted, "], got ", name_of(t.scalar_type()), " ",
          shape_of(t));
  }
  if (!t.is_contiguous()) {
    std::string strides = "[";
    for (int64_t i = 0; i < t.dim(); ++i) {
      strides += (i ? ", " : "") + std::to_string(t.stride(i));
    }
    check(false, op, ": ", name, " must be contiguous, got strides ", strides, "]");
  }
  check(t.scalar_type() != ScalarType::Double || !on_cuda(t), op, ": ", name,
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

Tensor empty(std::initializer_list<int64_t> shape, ScalarType dtype, const Tensor& like) {
  std::optional<Tensor> made;
  try {
    made = torch::stable::new_empty(like, shape, dtype);
  } catch (const std::exception&) {  // the stable ABI hands on that a call failed, not why
    std::string sizes;
    for (int64_t size : shape) sizes += (sizes.empty() ? "" : ", ") + std::to_string(size);
    check(false, "moekernels: no memory on ", device_of(like), " for ", name_of(dtype), " [", sizes,
          "]");
  }
  Tensor t = *made;
#ifdef MOEKERNELS_EMULATED
  emulated::note_array(t.const_data_ptr(), t.numel() * t.element_size());
#endif
  return t;
}

}  // namespace moekernels::binding
