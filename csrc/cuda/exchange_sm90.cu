// The experts' first and last products over rows of an exchange, in bf16: they read rows that are
// still on their way, and bring results home.
#include "moekernels/exchange.h"

#include "sm90/arriving.cuh"
#include "sm90/entry.cuh"
#include "sm90/ffn.cuh"
#include "sm90/going.cuh"
#include "sm90/peers.cuh"

namespace moekernels::cuda::sm90 {
namespace {

using T = __nv_bfloat16;

template <int kColumns>
void push_as(const char* name, const RowProduct& product, const GemmChoice& choice,
             const typename PushRows<T, kColumns>::Args& to, Stream stream) {
  run_with_peers<PushRows<T, kColumns>, Returns>(
      name, product, choice, tile_count(product.width, kColumns), kColumns, 128, to, to.to, stream);
}

void push(const char* name, const RowProduct& product, const GemmChoice& choice, const void* bias,
          const RowUse& use, const Going& home, Stream stream) {
  const T* b = static_cast<const T*>(bias);
  choice.tile_n == 128 ? push_as<128>(name, product, choice, {home, b, use}, stream)
                       : push_as<256>(name, product, choice, {home, b, use}, stream);
}

}  // namespace

void experts_up(const ExpertsUpArgs& args, const Arriving& from, const GemmChoice& choice,
                Stream stream) {
  up_with<T>(args, [&](const RowProduct& product, auto... rest) {
    run_with_peers<StoreUp<T>, Arrivals>("exchange_up_sm90", product, choice, rest..., from,
                                         stream);
  });
}

void experts_dact(const ExpertsDActArgs& args, const Arriving& from, const GemmChoice& choice,
                  Stream stream) {
  dact_with<StoreDAct<T>>(args, [&](const RowProduct& product, auto... rest) {
    run_with_peers<StoreDAct<T>, Arrivals>("exchange_dact_sm90", product, choice, rest..., from,
                                           stream);
  });
}

void experts_down(const ExpertsDownArgs& args, const Going& home, const GemmChoice& choice,
                  Stream stream) {
  const ExpertsArgs& of = args.of;
  const RowProduct product{.rows = args.a,
                           .w = of.w2,
                           .offsets = of.offsets,
                           .num_rows = of.num_rows,
                           .depth = of.ffn,
                           .width = of.hidden,
                           .experts = of.experts,
                           .along_n = of.transposed,
                           .dtype = of.dtype};
  push("exchange_down_sm90", product, choice, of.b2, use_of(of), home, stream);
}

void grouped_gemm(const GroupedGemmArgs& args, const Going& home, const GemmChoice& choice,
                  Stream stream) {
  const RowProduct product{.rows = args.rows,
                           .w = args.w,
                           .offsets = args.offsets,
                           .num_rows = args.num_rows,
                           .depth = args.in,
                           .width = args.out_width,
                           .experts = args.experts,
                           .along_n = args.transposed,
                           .dtype = args.dtype};
  push("exchange_dgrad_sm90", product, choice, nullptr, {nullptr, nullptr, 0}, home, stream);
}

}  // namespace moekernels::cuda::sm90
