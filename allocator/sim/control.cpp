// What a GPU does not have: calls for tests, loaded by Python beside the driver's own.
#include <unistd.h>

#include <cstdio>
#include <cstring>

#include "sim/sim.h"

using namespace sim;

SIM_EXPORT CUresult rotatorSimScale(uint64_t* scale) {
  Box* box = Box::open();
  SIM_CHECK(box != nullptr, CUDA_ERROR_NOT_INITIALIZED);
  *scale = box->config().scale;
  return CUDA_SUCCESS;
}

SIM_EXPORT int rotatorSimFaults(const char* rules) { return Faults::instance().set(rules) ? 0 : 1; }
SIM_EXPORT uint64_t rotatorSimCalls(const char* name) { return Faults::instance().calls(name); }
SIM_EXPORT uint64_t rotatorSimInjected() { return Faults::instance().injected(); }
SIM_EXPORT void rotatorSimClearLog() { Faults::instance().clear_log(); }

// The names of the calls so far, one a line, `!` behind those that a rule answered. Returns the bytes that it takes.
SIM_EXPORT std::size_t rotatorSimLog(char* text, std::size_t capacity) {
  const std::string log = Faults::instance().log();
  if (text != nullptr && capacity != 0) std::snprintf(text, capacity, "%s", log.c_str());
  return log.size() + 1;
}

// While held, kernels launched with `held` do not start.
SIM_EXPORT void rotatorSimHold(int hold) {
  Sim& s = ::sim::sim();
  const Lock lock(s.mutex);
  s.hold = hold != 0;
  pump();
  s.changed.notify_all();
}

// Real bytes of the box's device `index` in use by all processes, and by this one.
SIM_EXPORT uint64_t rotatorSimBytes(int index, int own) {
  Box* box = Box::open();
  if (box == nullptr) return 0;
  if (!own) return box->bytes_used(index);
  for (const auto& process : box->processes(index))
    if (process.pid == getpid()) return process.bytes;
  return 0;
}

// Of this process's device memory, what a network card could register.
SIM_EXPORT uint64_t rotatorSimRdmaBytes() {
  Sim& s = ::sim::sim();
  const Lock lock(s.mutex);
  uint64_t nbytes = 0;
  for (const auto& [name, handle] : s.handles) nbytes += handle.rdma ? handle.nbytes : 0;
  return nbytes;
}

SIM_EXPORT uint64_t rotatorSimRegisteredBytes() {
  Sim& s = ::sim::sim();
  const Lock lock(s.mutex);
  uint64_t nbytes = 0;
  for (const auto& [data, size] : s.registered) nbytes += size;
  return nbytes;
}
