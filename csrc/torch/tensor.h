// The only place where checks and messages are made: op, argument, what it must be, what it is.
// Messages are thrown as they stand, so that no file name or stack precedes them.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "moekernels/common.h"

namespace moekernels::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <class... Parts>
void check(bool ok, const Parts&... parts) {
  if (!ok) {
    std::ostringstream message;
    (message << ... << parts);
    throw std::runtime_error(message.str());
  }
}

// The entry of a register that an argument names.
template <class Enum, size_t count>
Enum named(const char* op, const char* argument, const char* const (&names)[count],
           const std::string& name) {
  for (size_t i = 0; i < count; ++i) {
    if (name == names[i]) return static_cast<Enum>(i);
  }
  std::string known;
  for (const char* each : names) known += (known.empty() ? "" : "|") + std::string(each);
  check(false, op, ": ", argument, " must be ", known, ", got '", name, "'");
  return {};
}

inline const void* pointer_of(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }

// "float32", "int32", ...: torch's own names without the prefix.
const char* name_of(ScalarType dtype);
// "[8, 2]"
std::string shape_of(const Tensor& t);

inline constexpr std::initializer_list<ScalarType> kFloats = {
    ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double};
inline constexpr std::initializer_list<ScalarType> kIds = {ScalarType::Int, ScalarType::Long};
inline constexpr std::initializer_list<ScalarType> kInt32 = {ScalarType::Int};
inline constexpr std::initializer_list<ScalarType> kInt64 = {ScalarType::Long};

// One axis of an expected shape: a letter, and its length where another argument has fixed it (-1:
// free).
struct Axis {
  const char* letter;
  int64_t length = -1;
};

// "cpu", "cuda:1"
std::string device_of(const Tensor& t);

// Checks rank before sizes, then dtype, shape, contiguity; `like` fixes the device.
void check_tensor(const char* op, const char* name, const Tensor& t,
                  std::initializer_list<ScalarType> dtypes, std::initializer_list<Axis> shape,
                  const Tensor* like = nullptr);

inline void check_optional(const char* op, const char* name, const OptionalTensor& t,
                           std::initializer_list<ScalarType> dtypes,
                           std::initializer_list<Axis> shape, const Tensor& like) {
  if (t) check_tensor(op, name, *t, dtypes, shape, &like);
}

// Refuses a tensor that is not where `like` is.
void check_device(const char* op, const char* name, const Tensor& t, const Tensor& like);

// Whether the CUDA launchers take this tensor; in the emulated build (tests) they take every one.
#ifdef MOEKERNELS_EMULATED
inline bool on_cuda(const Tensor&) { return true; }
#else
inline bool on_cuda(const Tensor& t) { return t.is_cuda(); }
#endif

DType dtype_of(const Tensor& t);
// The dtype of routing weights and sums beside activations of `dtype`: float64 stays, all else is
// float32.
inline ScalarType wide(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Uninitialised. Says how much was asked for where there is no memory.
Tensor empty(std::initializer_list<int64_t> shape, ScalarType dtype, const Tensor& like);
// The same; a large one on the CPU takes the memory of one that was freed, so that it need not be
// touched first.
Tensor empty_large(std::initializer_list<int64_t> shape, ScalarType dtype, const Tensor& like);
// How many ranks share this machine, as a launcher says in LOCAL_WORLD_SIZE. Throws where that is
// no number.
int64_t processes_here();

// Runs f(begin, end) over [0, n) on torch's own threads; a small n stays on the caller's thread.
template <class F>
void parallel(int64_t n, int64_t grain, const F& f) {
  if (n <= 0) return;
  if (n <= grain) {
    f(int64_t{0}, n);
  } else {
    torch::stable::parallel_for(0, n, grain, f);
  }
}

// How many rows of `row_bytes` make a piece of work worth a thread: 128 KiB of traffic takes longer
// than waking one.
inline int64_t grain_of(int64_t row_bytes) {
  constexpr int64_t kWorthAThread = 131072;
  return row_bytes > kWorthAThread ? 1 : kWorthAThread / (row_bytes > 0 ? row_bytes : 1);
}

}  // namespace moekernels::binding
