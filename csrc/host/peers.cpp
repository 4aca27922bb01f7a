#include "peers.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <cstring>
#include <numeric>
#include <thread>

namespace moekernels::host {
namespace {

template <class T>
T* to(intptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Sleep, as another rank may need the core; the last microseconds are too short for that.
void until(int64_t moment) {
  constexpr int64_t kShort = 60'000;
  for (int64_t left = moment - now(); left > 0; left = moment - now()) {
    if (left > kShort) std::this_thread::sleep_for(std::chrono::nanoseconds(left - kShort));
  }
}

// Elements as they lie, and what they are summed in.
struct BFloat16 {
  uint16_t bits;
};
double wide(double x) { return x; }
float wide(float x) { return x; }
float wide(BFloat16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
void narrow(double from, double& to) { to = from; }
void narrow(float from, float& to) { to = from; }
void narrow(float from, BFloat16& to) {  // to the nearest, of two the even one
  const auto bits = std::bit_cast<uint32_t>(from);
  const uint32_t nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  to.bits = static_cast<uint16_t>(from != from ? 0x7fc0 : nearest);
}

// out [n], the sum of parts of n elements in their order.
template <class T>
void sum_in_order(const std::vector<const char*>& parts, char* out, int64_t n) {
  constexpr int64_t kAtOnce = 256;
  decltype(wide(T{})) sums[kAtOnce];
  for (int64_t first = 0; first < n; first += kAtOnce) {
    const int64_t count = std::min(kAtOnce, n - first);
    const auto at = [&](const char* part) { return reinterpret_cast<const T*>(part) + first; };
    for (int64_t i = 0; i < count; ++i) sums[i] = wide(at(parts[0])[i]);
    for (size_t p = 1; p < parts.size(); ++p) {
      for (int64_t i = 0; i < count; ++i) sums[i] += wide(at(parts[p])[i]);
    }
    for (int64_t i = 0; i < count; ++i) narrow(sums[i], (reinterpret_cast<T*>(out) + first)[i]);
  }
}

struct Summing {
  int64_t bytes;
  void (*sum)(const std::vector<const char*>&, char*, int64_t);
};
template <class T>
constexpr Summing kSumming{sizeof(T), &sum_in_order<T>};
constexpr Summing kSums[] = {kSumming<float>, kSumming<double>, kSumming<BFloat16>};

}  // namespace

void expect_bytes(int peer, uint64_t came, int64_t wanted) {
  if (came != static_cast<uint64_t>(wanted)) {
    throw std::runtime_error("peer " + std::to_string(peer) + " sent " + std::to_string(came) +
                             " bytes where " + std::to_string(wanted) + " were expected");
  }
}

int Peers::open(int64_t label) {
  auto found = std::find_if(exchanges_.begin(), exchanges_.end(), [](auto& e) { return !e.open; });
  if (found == exchanges_.end()) found = exchanges_.insert(found, Exchange{});
  Exchange& e = *found;
  e.open = true;
  e.numbers.assign(size(), 0);
  e.messages.assign(size(), {});
  e.sizes.assign(size(), 0);
  e.placed.assign(size(), 0);
  e.stamps = {};
  e.stamps.label = label;
  for_peers([&](int p) { e.numbers[p] = expect(0, p); });
  return static_cast<int>(found - exchanges_.begin());
}

Peers::Exchange& Peers::at(int exchange) {
  if (exchange < 0 || exchange >= static_cast<int>(exchanges_.size()) ||
      !exchanges_[exchange].open) {
    throw std::runtime_error("exchange " + std::to_string(exchange) + " was not posted, or taken");
  }
  return exchanges_[exchange];
}

void Peers::arrive(Exchange& e, uint32_t tag, bool stamped) {
  Stamps& s = e.stamps;
  s.need = now();
  for_peers([&](int p) {
    e.messages[p] = wait(0, p, e.numbers[p], tag);
    s.last = std::max(s.last, e.messages[p].posted);
    s.bytes += static_cast<int64_t>(e.messages[p].bytes);
  });
  s.ready = std::max(s.post, s.last);
  if (stamped && (latency > 0 || rate > 0)) {
    const double carried = rate > 0 ? static_cast<double>(s.bytes) / rate : 0;
    link_free_ = std::max(link_free_, s.ready) + static_cast<int64_t>(carried);
    s.ready = link_free_ + latency;
    until(s.ready);
  }
  s.got = now();
}

void Peers::close(Exchange& e, bool stamped) {
  for_peers([&](int p) { taken(0, p, e.numbers[p]); });
  e.open = false;
  if (stamped) stamps_.push_back(e.stamps);
}

void Peers::all_to_all(intptr_t x, intptr_t out, const std::vector<int64_t>& sends,
                       const std::vector<int64_t>& receives, bool stamped) {
  const int64_t began = now();
  std::vector<int64_t> from(size() + 1), into(size() + 1);
  for (int p = 0; p < size(); ++p) {
    from[p + 1] = from[p] + sends.at(p);
    into[p + 1] = into[p] + receives.at(p);
  }
  expect_bytes(rank(), sends[rank()], receives[rank()]);
  Exchange& e = exchanges_[open(kWhole)];
  for_peers([&](int p) {
    char* block = allocate(sends[p]);
    std::memcpy(block, to<char>(x) + from[p], sends[p]);
    post(0, p, sends[p], kAll);
  });
  e.stamps.post = now();
  std::memcpy(to<char>(out) + into[rank()], to<char>(x) + from[rank()], sends[rank()]);
  e.stamps.moving = now() - began;
  arrive(e, kAll, stamped);
  const int64_t came = now();
  for_peers([&](int p) {
    expect_bytes(p, e.messages[p].bytes, receives[p]);
    std::memcpy(to<char>(out) + into[p], e.messages[p].data, receives[p]);
  });
  e.stamps.moving += now() - came;
  close(e, stamped);
}

void Peers::all_gather(intptr_t x, intptr_t out, int64_t bytes, bool stamped) {
  const int64_t began = now();
  Exchange& e = exchanges_[open(kWhole)];
  char* block = allocate(bytes);
  std::memcpy(block, to<char>(x), bytes);
  for_peers([&](int p) { post(0, p, bytes, kGather); });
  e.stamps.post = now();
  std::memcpy(to<char>(out) + rank() * bytes, to<char>(x), bytes);
  e.stamps.moving = now() - began;
  arrive(e, kGather, stamped);
  const int64_t came = now();
  for_peers([&](int p) {
    expect_bytes(p, e.messages[p].bytes, bytes);
    std::memcpy(to<char>(out) + p * bytes, e.messages[p].data, bytes);
  });
  e.stamps.moving += now() - came;
  close(e, stamped);
}

void Peers::sum(intptr_t from, intptr_t into, int64_t n, int kind, bool apart) {
  const char* x = to<char>(from);
  const Summing& how = kSums[kind];
  const int64_t bytes = n * how.bytes;
  const Tag tag = apart ? kParts : kSame;
  Exchange& e = exchanges_[open(kWhole)];
  char* block = nullptr;
  for_peers([&](int p) {
    if (apart || block == nullptr) {
      block = allocate(bytes);
      std::memcpy(block, apart ? x + p * bytes : x, bytes);
    }
    post(0, p, bytes, tag);
  });
  arrive(e, tag, false);
  std::vector<const char*> parts(size());
  parts[rank()] = apart ? x + rank() * bytes : x;
  for_peers([&](int p) {
    expect_bytes(p, e.messages[p].bytes, bytes);
    parts[p] = e.messages[p].data;
  });
  how.sum(parts, to<char>(into), n);
  close(e, false);
}

void Peers::send(int lane, int peer, intptr_t x, int64_t bytes, uint32_t tag) {
  char* block = allocate(bytes);
  std::memcpy(block, to<char>(x), bytes);
  post(lane, peer, bytes, tag);
}

void Peers::receive(int lane, int peer, uint32_t number, intptr_t out, int64_t bytes,
                    uint32_t tag) {
  const Message message = wait(lane, peer, number, tag);
  expect_bytes(peer, message.bytes, bytes);
  std::memcpy(to<char>(out), message.data, bytes);
  taken(lane, peer, number);
}

std::vector<Stamps> Peers::take_stamps() {
  std::vector<Stamps> taken;
  taken.swap(stamps_);
  return taken;
}

void bind_peers(pybind11::module_& m) {
  namespace py = pybind11;
  using Free = py::call_guard<py::gil_scoped_release>;
  static py::object lost = py::reinterpret_steal<py::object>(
      PyErr_NewException("moekernels._host.Lost", PyExc_RuntimeError, nullptr));
  m.attr("Lost") = lost;
  py::register_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const Lost& e) {
      PyErr_SetObject(lost.ptr(), py::make_tuple(e.peer, e.seconds, e.gone).ptr());
    }
  });
  m.def("now", &now, "Nanoseconds of the clock that all processes of a machine share.");
  m.def("total", [](intptr_t counts, int64_t n) {
    const auto* first = reinterpret_cast<const int64_t*>(counts);
    return std::accumulate(first, first + n, 0LL);
  }, "The sum of n int64.");
  py::class_<Route>(m, "Route")
      .def(py::init<int64_t, int, int64_t, int64_t, int64_t, intptr_t, intptr_t, intptr_t>(),
           py::arg("layer"), py::arg("peers"), py::arg("experts"), py::arg("tokens"),
           py::arg("top_k"), py::arg("token_of"), py::arg("slot_of"), py::arg("outgoing"))
      .def("came",
           [](const Route& self, int64_t first, int64_t end) { return self.came({first, end}); });
  py::class_<Peers>(m, "Peers")
      .def(py::init<int, int, uint64_t>(), py::arg("rank"), py::arg("size"), py::arg("space"))
      .def_property_readonly("fd", &Peers::fd)
      .def_property_readonly("held", &Peers::held)
      .def_readwrite("spins", &Peers::spins)
      .def_readwrite("patience", &Peers::patience)
      .def_readwrite("latency", &Peers::latency)
      .def_readwrite("rate", &Peers::rate)
      .def("connect", &Peers::connect)
      .def("post_out",
           [](Peers& self, Route& route, intptr_t x, intptr_t weights, int64_t row, int64_t weight,
              int64_t first, int64_t end) {
    return self.post_out(route, x, weights, {row, weight}, {first, end});
  },
           Free())
      .def("arrive", py::overload_cast<int>(&Peers::arrive), Free())
      .def("take_out", &Peers::take_out, Free())
      .def("post_back",
           [](Peers& self, Route& route, intptr_t rows, intptr_t weights, int64_t row,
              int64_t weight, int64_t room, int64_t first, int64_t end) {
    return self.post_back(route, rows, weights, {row, weight}, room, {first, end});
  },
           Free())
      .def("take_back", &Peers::take_back, Free())
      .def("all_to_all", &Peers::all_to_all, Free())
      .def("all_gather", &Peers::all_gather, Free())
      .def("reduce_scatter", &Peers::reduce_scatter, Free())
      .def("all_reduce", &Peers::all_reduce, Free())
      .def("send", &Peers::send, Free())
      .def("expect", &Peers::expect)
      .def("receive", &Peers::receive, Free())
      .def("take_stamps", [](Peers& self) {
    py::list all;
    for (const Stamps& s : self.take_stamps()) {
      all.append(
          py::make_tuple(s.post, s.last, s.ready, s.need, s.got, s.moving, s.bytes, s.label));
    }
    return all;
  });
}

}  // namespace moekernels::host
