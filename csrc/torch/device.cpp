// The CUDA symbols of torch's C shim are declared weak before any torch header: the one library
// loads where torch has no CUDA, and calls them only where it has.
#include <cstdint>

#if defined(MOEKERNELS_WITH_CUDA) && !defined(MOEKERNELS_EMULATED)
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device,
                                                                            void** stream);
#endif

#include "device.h"

#include <torch/csrc/stable/accelerator.h>

#include <memory>

namespace moekernels::binding {

#if defined(MOEKERNELS_WITH_CUDA) && !defined(MOEKERNELS_EMULATED)
CudaScope::CudaScope(const Tensor& like) {
  check(aoti_torch_get_current_cuda_stream != nullptr,
        "this torch has no CUDA: it holds no tensors on a CUDA device");
  const int32_t device = like.get_device();
  auto guard = std::make_unique<torch::stable::accelerator::DeviceGuard>(device);
  check(aoti_torch_get_current_cuda_stream(device, &stream_) == 0,
        "torch gave no current stream for device ", device);
  guard_ = guard.release();
}

CudaScope::~CudaScope() { delete static_cast<torch::stable::accelerator::DeviceGuard*>(guard_); }
#else
CudaScope::CudaScope(const Tensor&) {}
CudaScope::~CudaScope() = default;
#endif

}  // namespace moekernels::binding
