// One grouped product as CUTLASS's kernel: warp-specialised, cooperative, with TMA, a group's
// tensor maps made on the device.
#pragma once

#include <cutlass/cutlass.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>

#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/group_array_problem_shape.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include <string>

#include "group_problems.h"
#include "mma/launch.cuh"

namespace moekernels::cuda {

// Rows and columns as CUTLASS names the layouts of A [m, k] and B [k, n].
using Rows = cutlass::layout::RowMajor;
using Columns = cutlass::layout::ColumnMajor;

// D = A B, or D += A B; sums in fp32.
template <class In, class Out, class LayoutA, class LayoutB, bool accumulate>
struct CutlassProduct {
  // The large tile of two warpgroups. A cluster is two tiles wide, not high: columns come in whole
  // tiles at our widths, an expert's rows do not.
  using Tile = cute::Shape<cute::_128, cute::_256, cute::_64>;
  using Cluster = cute::Shape<cute::_1, cute::_2, cute::_1>;
  using Sizes = cute::Shape<int, int, int>;
  static constexpr int kAlignIn = 16 / sizeof(In), kAlignOut = 16 / sizeof(Out);
  using Source = std::conditional_t<accumulate, Out, void>;

  // A layout as a pointer says that every group has its own.
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, Source, Rows*, kAlignOut, Out,
      Rows*, kAlignOut, cutlass::epilogue::PtrArrayTmaWarpSpecializedCooperative>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, In, LayoutA*, kAlignIn, In, LayoutB*,
      kAlignIn, float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<sizeof(typename Epilogue::SharedStorage)>,
      cutlass::gemm::KernelPtrArrayTmaWarpSpecializedCooperative>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cutlass::gemm::GroupProblemShape<Sizes>,
                                                      Mainloop, Epilogue>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
  using StrideA = typename Kernel::InternalStrideA;
  using StrideB = typename Kernel::InternalStrideB;
  using StrideD = typename Kernel::InternalStrideD;

  // What group_problems writes is what CUTLASS reads.
  static_assert(sizeof(Sizes) == sizeof(GroupSizes));
  static_assert(sizeof(StrideA) == 8 && sizeof(StrideB) == 8 && sizeof(StrideD) == 8);

  static int64_t scratch_bytes(int64_t experts) {
    return group_arrays_bytes(experts) +
           static_cast<int64_t>(Gemm::get_workspace_size(arguments({}, experts)));
  }

  static void run(const char* name, const GroupProblems& problems, void* scratch, Stream stream) {
    const GroupArrays arrays = group_arrays(scratch, problems.experts);
    write_group_problems(problems, arrays, stream);
    Gemm gemm;
    const auto args = arguments(arrays, static_cast<int>(problems.experts));
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    check_status(name, Gemm::can_implement(args));
    check_status(name, gemm.initialize(
                           args, static_cast<char*>(scratch) + group_arrays_bytes(problems.experts),
                           cuda_stream));
    check_status(name, gemm.run(cuda_stream));
    check(cudaGetLastError(), name);
  }

 private:
  static typename Gemm::Arguments arguments(const GroupArrays& arrays, int experts) {
    typename Gemm::Arguments args;
    args.mode = cutlass::gemm::GemmUniversalMode::kGrouped;
    args.problem_shape = {experts, reinterpret_cast<Sizes*>(arrays.sizes), nullptr};
    args.mainloop = {const_cast<const In**>(reinterpret_cast<In**>(arrays.a.address)),
                     reinterpret_cast<StrideA*>(arrays.a.stride),
                     const_cast<const In**>(reinterpret_cast<In**>(arrays.b.address)),
                     reinterpret_cast<StrideB*>(arrays.b.stride)};
    args.epilogue.thread.alpha = 1.0f;
    args.epilogue.thread.beta = accumulate ? 1.0f : 0.0f;
    if constexpr (accumulate) {
      args.epilogue.ptr_C = const_cast<const Out**>(reinterpret_cast<Out**>(arrays.d.address));
      args.epilogue.dC = reinterpret_cast<StrideD*>(arrays.d.stride);
    }
    args.epilogue.ptr_D = reinterpret_cast<Out**>(arrays.d.address);
    args.epilogue.dD = reinterpret_cast<StrideD*>(arrays.d.stride);
    check(cudaGetDevice(&args.hw_info.device_id), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&args.hw_info.sm_count, cudaDevAttrMultiProcessorCount,
                                 args.hw_info.device_id),
          "cudaDeviceGetAttribute");
    return args;
  }

  static void check_status(const char* name, cutlass::Status status) {
    if (status == cutlass::Status::kSuccess) return;
    check(cudaGetLastError(), name);  // the more precise word, where CUDA has one
    throw std::runtime_error(std::string(name) + ": CUTLASS says " +
                             cutlass::cutlassGetStatusString(status));
  }
};

// Calls f(CUTLASS's name of the dtype as a null pointer).
template <class F>
auto with_cutlass_type(DType dtype, const F& f) {
  return dtype == DType::f16 ? f(static_cast<cutlass::half_t*>(nullptr))
                             : f(static_cast<cutlass::bfloat16_t*>(nullptr));
}

inline const char* why_not(GemmOp op, DType dtype, int64_t m, int64_t n, int64_t k, int64_t experts,
                           int64_t alignment) {
  return why_not_wgmma({.op = op,
                        .dtype = dtype,
                        .m = m,
                        .n = n,
                        .k = k,
                        .experts = experts,
                        .alignment = alignment,
                        .tf32 = false,
                        .capability = capability(),
                        .wgmma = true});
}

}  // namespace moekernels::cuda
