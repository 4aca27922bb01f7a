#include "peers.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <thread>

namespace moekernels::host {
namespace {

enum Tag : uint32_t { kOut = 1u << 31, kBack, kAll, kGather };  // beside those of `send`

int64_t header(int64_t experts) { return (experts * 8 + 63) / 64 * 64; }

int64_t sum(const int64_t* counts, int64_t n) {
  int64_t total = 0;
  for (int64_t i = 0; i < n; ++i) total += counts[i];
  return total;
}

// How many of the rows [begin, begin + n) lie in front of `room`.
int64_t within(int64_t begin, int64_t n, int64_t room) {
  return std::clamp<int64_t>(room - begin, 0, n);
}

void expect_bytes(int peer, uint64_t came, int64_t wanted) {
  if (came != static_cast<uint64_t>(wanted)) {
    throw std::runtime_error("peer " + std::to_string(peer) + " sent " + std::to_string(came) +
                             " bytes where " + std::to_string(wanted) + " were expected");
  }
}

template <class T>
T* to(intptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Where the runs of counts [P, e] lie: call(peer, expert, row by expert then peer, row by peer then
// expert, rows).
template <class Call>
void for_runs(const int64_t* counts, int peers, int64_t experts, const Call& call) {
  std::vector<int64_t> by_peer(peers);
  int64_t row = 0;
  for (int64_t x = 0; x < experts; ++x) {
    for (int p = 0; p < peers; ++p) {
      const int64_t n = counts[p * experts + x];
      call(p, x, row, by_peer[p], n);
      row += n;
      by_peer[p] += n;
    }
  }
}

// Sleep, as another rank may need the core; the last microseconds are too short for that.
void until(int64_t moment) {
  constexpr int64_t kShort = 60'000;
  for (int64_t left = moment - now(); left > 0; left = moment - now()) {
    if (left > kShort) std::this_thread::sleep_for(std::chrono::nanoseconds(left - kShort));
  }
}

}  // namespace

void Peers::Exchange::copy_own(int64_t begin, int64_t end, char* row, char* weight) const {
  for (int64_t r = begin; r < end; ++r, row += width.row, weight += width.weight) {
    const int64_t slot = slot_of[r];
    if (slot < 0 || slot >= slots) throw std::runtime_error("a row's slot is outside the tokens");
    std::memcpy(row, rows + slot / top_k * width.row, width.row);
    std::memcpy(weight, weights + slot * width.weight, width.weight);
  }
}

void Peers::Exchange::copy_back(int64_t begin, int64_t n, char* row, char* weight) const {
  const int64_t here = within(begin, n, room);
  std::memcpy(row, rows + begin * width.row, here * width.row);
  std::memset(row + here * width.row, 0, (n - here) * width.row);
  std::memcpy(weight, weights + begin * width.weight, here * width.weight);
  std::memset(weight + here * width.weight, 0, (n - here) * width.weight);
}

int Peers::open() {
  auto found = std::find_if(exchanges_.begin(), exchanges_.end(), [](auto& e) { return !e.open; });
  if (found == exchanges_.end()) found = exchanges_.insert(found, Exchange{});
  Exchange& e = *found;
  e.open = true;
  e.numbers.assign(size(), 0);
  e.messages.assign(size(), {});
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

int Peers::post_out(intptr_t x, intptr_t weights, intptr_t slot_of, int64_t slots, int64_t top_k,
                    Width width, intptr_t counts, int64_t all, int64_t first_expert,
                    int64_t experts) {
  const int64_t began = now();
  const int exchange = open();
  Exchange& e = exchanges_[exchange];
  e.rows = to<const char>(x);
  e.weights = to<const char>(weights);
  e.slot_of = to<const int32_t>(slot_of);
  e.own_counts = to<const int64_t>(counts);
  e.width = width;
  e.slots = slots;
  e.top_k = top_k;
  e.all = all;
  e.first = first_expert;
  e.experts = experts;
  for_peers([&](int p) {
    const int64_t* mine = e.own_counts + p * all + first_expert;
    const int64_t first = sum(e.own_counts, p * all + first_expert), n = sum(mine, experts);
    const int64_t bytes = header(experts) + n * (width.row + width.weight);
    char* block = allocate(bytes);
    std::memcpy(block, mine, experts * 8);
    char* row = block + header(experts);
    e.copy_own(first, first + n, row, row + n * width.row);
    post(0, p, block, bytes, kOut);
  });
  e.stamps.post = now();
  e.stamps.moving = e.stamps.post - began;
  return exchange;
}

int64_t Peers::arrive(int exchange, intptr_t told) {
  Exchange& e = at(exchange);
  arrive(e, kOut, true);
  e.counts.resize(size() * e.experts);
  for (int p = 0; p < size(); ++p) {
    const void* from = p == rank() ? e.own_counts + p * e.all + e.first
                                   : static_cast<const void*>(e.messages[p].data);
    std::memcpy(e.counts.data() + p * e.experts, from, e.experts * 8);
    if (p == rank()) continue;
    const int64_t n = sum(e.counts.data() + p * e.experts, e.experts);
    expect_bytes(p, e.messages[p].bytes, header(e.experts) + n * (e.width.row + e.width.weight));
  }
  int64_t* out = std::copy(e.counts.begin(), e.counts.end(), to<int64_t>(told));
  int64_t total = 0;
  for (int64_t x = 0; x < e.experts; ++x) {
    *out++ = total;
    for (int p = 0; p < size(); ++p) total += e.counts[p * e.experts + x];
  }
  return *out = total;
}

void Peers::take_out(int exchange, intptr_t rows, intptr_t weights, int64_t room) {
  Exchange& e = at(exchange);
  const int64_t began = now();
  const Width w = e.width;
  const int64_t mine = sum(e.own_counts, rank() * e.all + e.first);  // own rows before these
  std::vector<int64_t> sizes(size());
  for (int p = 0; p < size(); ++p) sizes[p] = sum(e.counts.data() + p * e.experts, e.experts);
  const int64_t all = within(0, sum(sizes.data(), size()), room);
  std::memset(to<char>(rows) + all * w.row, 0, (room - all) * w.row);
  std::memset(to<char>(weights) + all * w.weight, 0, (room - all) * w.weight);
  for_runs(e.counts.data(), size(), e.experts,
           [&](int p, int64_t, int64_t row, int64_t source, int64_t run) {
    const int64_t n = within(row, run, room);
    if (n == 0) return;
    char* out = to<char>(rows) + row * w.row;
    char* out_weights = to<char>(weights) + row * w.weight;
    if (p != rank()) {
      const char* from = e.messages[p].data + header(e.experts);
      std::memcpy(out, from + source * w.row, n * w.row);
      from += sizes[p] * w.row;
      std::memcpy(out_weights, from + source * w.weight, n * w.weight);
      return;
    }
    e.copy_own(mine + source, mine + source + n, out, out_weights);
  });
  e.stamps.moving += now() - began;
  close(e, true);
}

int Peers::post_back(intptr_t rows, intptr_t weights, Width width, intptr_t counts, int64_t experts,
                     int64_t room) {
  const int64_t began = now();
  const int exchange = open();
  Exchange& e = exchanges_[exchange];
  e.rows = to<const char>(rows);
  e.weights = to<const char>(weights);
  e.own_counts = to<const int64_t>(counts);
  e.width = width;
  e.experts = experts;
  e.room = room;
  // Where each expert's rows of a peer begin among all.
  std::vector<int64_t> begins(size() * experts);
  for_runs(e.own_counts, size(), experts,
           [&](int p, int64_t x, int64_t row, int64_t, int64_t) { begins[p * experts + x] = row; });
  for_peers([&](int p) {
    const int64_t* n = e.own_counts + p * experts;
    const int64_t all = sum(n, experts);
    char* row = allocate(all * (width.row + width.weight));
    const char* block = row;
    char* weight = row + all * width.row;
    for (int64_t x = 0; x < experts; ++x) {
      e.copy_back(begins[p * experts + x], n[x], row, weight);
      row += n[x] * width.row;
      weight += n[x] * width.weight;
    }
    post(0, p, block, all * (width.row + width.weight), kBack);
  });
  e.stamps.post = now();
  e.stamps.moving = e.stamps.post - began;
  return exchange;
}

void Peers::take_back(int exchange, intptr_t rows, intptr_t weights, intptr_t counts,
                      int64_t experts, int64_t first) {
  Exchange& e = at(exchange);
  arrive(e, kBack, true);
  const int64_t began = now();
  const Width w = e.width;
  for (int p = 0; p < size(); ++p) {
    const int64_t* sent = to<const int64_t>(counts);
    const int64_t start = sum(sent, p * experts + first);
    const int64_t n = sum(sent + p * experts + first, e.experts);
    char* out = to<char>(rows) + start * w.row;
    char* out_weights = to<char>(weights) + start * w.weight;
    if (p != rank()) {
      expect_bytes(p, e.messages[p].bytes, n * (w.row + w.weight));
      std::memcpy(out, e.messages[p].data, n * w.row);
      std::memcpy(out_weights, e.messages[p].data + n * w.row, n * w.weight);
      continue;
    }
    expect_bytes(p, sum(e.own_counts + p * e.experts, e.experts), n);
    for_runs(e.own_counts, size(), e.experts,
             [&](int peer, int64_t, int64_t row, int64_t source, int64_t run) {
      if (peer != p) return;
      e.copy_back(row, run, out + source * w.row, out_weights + source * w.weight);
    });
  }
  e.stamps.moving += now() - began;
  close(e, true);
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
  Exchange& e = exchanges_[open()];
  for_peers([&](int p) {
    char* block = allocate(sends[p]);
    std::memcpy(block, to<char>(x) + from[p], sends[p]);
    post(0, p, block, sends[p], kAll);
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
  Exchange& e = exchanges_[open()];
  char* block = allocate(bytes);
  std::memcpy(block, to<char>(x), bytes);
  for_peers([&](int p) { post(0, p, block, bytes, kGather); });
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

void Peers::send(int lane, int peer, intptr_t x, int64_t bytes, uint32_t tag) {
  char* block = allocate(bytes);
  std::memcpy(block, to<char>(x), bytes);
  post(lane, peer, block, bytes, tag);
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
  py::class_<Peers>(m, "Peers")
      .def(py::init<int, int, uint64_t>(), py::arg("rank"), py::arg("size"), py::arg("space"))
      .def_property_readonly("fd", &Peers::fd)
      .def_property_readonly("held", &Peers::held)
      .def_readwrite("spins", &Peers::spins)
      .def_readwrite("patience", &Peers::patience)
      .def_readwrite("latency", &Peers::latency)
      .def_readwrite("rate", &Peers::rate)
      .def_readwrite("label", &Peers::label)
      .def("connect", &Peers::connect)
      .def("post_out",
           [](Peers& self, intptr_t x, intptr_t weights, intptr_t slot_of, int64_t slots,
              int64_t top_k, int64_t row, int64_t weight, intptr_t counts, int64_t experts,
              int64_t first, int64_t n) {
    return self.post_out(x, weights, slot_of, slots, top_k, {row, weight}, counts, experts, first,
                         n);
  },
           Free())
      .def("arrive", py::overload_cast<int, intptr_t>(&Peers::arrive), Free())
      .def("take_out", &Peers::take_out, Free())
      .def("post_back",
           [](Peers& self, intptr_t rows, intptr_t weights, int64_t row, int64_t weight,
              intptr_t counts, int64_t experts, int64_t room) {
    return self.post_back(rows, weights, {row, weight}, counts, experts, room);
  },
           Free())
      .def("take_back", &Peers::take_back, Free())
      .def("all_to_all", &Peers::all_to_all, Free())
      .def("all_gather", &Peers::all_gather, Free())
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
