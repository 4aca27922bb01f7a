// The clocks of ranks that exchange rows. Addresses of the peers' words are plain numbers.
#include "moekernels/exchange_clock.h"

#include "slabs.h"

namespace moekernels::binding {
namespace {

int64_t exchange_clock_bytes(int64_t peers) { return ClockWords::bytes(peers); }

int64_t exchange_record_words(int64_t peers) { return Record::words(peers); }

Tensor exchange_clock(const Tensor& words, Numbers addresses, int64_t rank, int64_t patience,
                      const OptionalTensor& stuck) {
  const char* op = "exchange_clock";
  ClockArgs args{};
  args.peers = static_cast<int64_t>(addresses.size());
  check(args.peers >= 1 && args.peers <= kMostPeers, op, ": addresses must be 1 to ", kMostPeers,
        " numbers, one a rank, got ", args.peers);
  check_tensor(op, "words", words, {ScalarType::Byte}, {{"bytes", ClockWords::bytes(args.peers)}});
  check(rank >= 0 && rank < args.peers, op, ": rank must be 0 to ", args.peers - 1, ", got ", rank);
  for (int64_t p = 0; p < args.peers; ++p) {
    check(addresses[p] != 0 && addresses[p] % ClockWords::kEach == 0, op, ": addresses[", p,
          "] must be a multiple of ", ClockWords::kEach, ", got ", addresses[p]);
    args.words[p] = reinterpret_cast<char*>(addresses[p]);
  }
  check(args.words[rank] == words.const_data_ptr(), op, ": addresses[", rank,
        "] must be that of the own words");
  check(patience >= 0, op, ": patience must not be negative, got ", patience);
  args.rank = rank;
  args.patience = patience;
  args.stuck = stuck_from(op, stuck);
  Tensor ahead = empty({args.peers + 1}, ScalarType::Long, words);
  args.ahead = ahead.mutable_data_ptr<int64_t>();
  run(words, [&](auto stream) { cuda::exchange_clock(args, stream); },
      [&] { cpu::exchange_clock(args); });
  return ahead;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(MOEKERNELS_OPS, m) {
  m.def("_exchange_clock_bytes(int peers) -> int");
  m.def("_exchange_record_words(int peers) -> int");
  m.def(
      "_exchange_clock(Tensor(a!) words, int[] addresses, int rank, int patience, Tensor? stuck) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(MOEKERNELS_OPS, CompositeExplicitAutograd, library) {
  library.impl("_exchange_clock_bytes", TORCH_BOX(&exchange_clock_bytes));
  library.impl("_exchange_record_words", TORCH_BOX(&exchange_record_words));
}

MOEKERNELS_IMPL(m) { m.impl("_exchange_clock", TORCH_BOX(&exchange_clock)); }

}  // namespace moekernels::binding
