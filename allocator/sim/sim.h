// The simulated driver's state in one process: contexts, mappings, streams and their virtual time, one mutex for all.
#pragma once

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <vector>

#include "csrc/driver.h"
#include "csrc/ranges.h"
#include "sim/box.h"
#include "sim/faults.h"

#define SIM_EXPORT extern "C" __attribute__((visibility("default")))

struct CUctx_st {
  int device;  // the box's index
  int references = 0;
};

namespace sim {
// One recording of an event. A wait or a query is for the latest one at that moment, whatever is recorded after.
struct Mark {
  unsigned pending = 0;  // streams that have not come to it
};
}  // namespace sim

struct CUmod_st {
  int device;
  std::string text;  // PTX
};

struct CUfunc_st {
  CUmodule module;
  std::string name;
};

struct CUevent_st {
  int device;
  std::shared_ptr<sim::Mark> latest = std::make_shared<sim::Mark>();
};

namespace sim {

using Clock = std::chrono::steady_clock;

struct Span {
  CUdeviceptr address = 0;
  std::size_t nbytes = 0;
  bool meets(CUdeviceptr other, std::size_t other_nbytes) const {
    return address < other + other_nbytes && other < address + nbytes;
  }
};

// Work in a stream: it starts when what it waits for is done and its link is free, lasts its cost, and takes effect at
// its end. Nothing runs by itself: whoever asks the driver anything pumps what is due.
struct Op {
  std::function<CUresult()> effect;
  std::function<CUresult()> begun;   // what it has done when it has only started; a copy has then moved one half
  std::function<CUresult()> always;  // what it does while it runs, each time that anybody looks
  std::array<Span, 2> touches{};     // the device memory that it touches while it runs
  Span host{};                       // the host memory, which the driver may reach until it ends
  Clock::duration cost{};
  Clock::time_point* link = nullptr;    // the engine, or the kernels, that take turns for it
  Clock::time_point* wire = nullptr;    // the wire to the device, which an engine and kernels share
  Clock::time_point* clearing = nullptr;  // until when the engine that it needs has memory to clear besides
  bool held = false;                    // a kernel that waits for rotatorSimRelease
  std::shared_ptr<Mark> awaited;        // started only when this is done
  Clock::time_point queued_at{};
  Clock::time_point done_at{};
  bool started = false;
};

}  // namespace sim

struct CUstream_st {
  int device;
  int priority = 0;  // lower goes first
  std::deque<sim::Op> ops;
  sim::Clock::time_point ready_at{};
  bool capturing = false;
  bool capture_broken = false;
};

namespace sim {

// Physical bytes of one device in this process: ranges of one memory file.
struct Physical {
  int fd = -1;
  rotator::Ranges ranges;
};

struct Handle {
  int device;
  std::size_t offset;
  std::size_t nbytes;
  bool rdma = false;
  unsigned mappings = 0;
  bool released = false;
};

struct MappedRange {
  std::size_t nbytes;
  CUmemGenericAllocationHandle handle;
  bool access;
};

struct Sim {
  std::mutex mutex;
  std::condition_variable changed;
  Box* box = nullptr;
  pid_t pid = 0;
  CUresult sticky = CUDA_SUCCESS;  // as on a GPU: after an illegal address nothing works any more
  std::vector<int> visible;
  std::map<int, std::unique_ptr<CUctx_st>> contexts;
  std::map<int, Physical> physical;
  std::map<CUdeviceptr, std::size_t> reservations;
  std::map<CUdeviceptr, MappedRange> mappings;
  std::map<CUmemGenericAllocationHandle, Handle> handles;
  CUmemGenericAllocationHandle next_handle = 1;
  std::map<const char*, std::size_t> registered;
  std::map<CUdeviceptr, std::size_t> plain;   // cuMemAlloc
  std::map<void*, std::size_t> pinned;        // cuMemHostAlloc; also in `registered`
  std::set<CUstream> streams;
  std::vector<CUstream> by_priority;  // the same ones
  std::map<int, CUstream> default_streams;
  std::map<CUevent, std::unique_ptr<CUevent_st>> events;
  std::list<std::unique_ptr<CUmod_st>> modules;
  std::list<std::unique_ptr<CUfunc_st>> functions;
  std::map<int, std::array<Clock::time_point, 3>> links;  // copies to the device, to the host; kernels that read the host
  std::map<int, Clock::time_point> wires;     // to each device, by whoever copies
  std::map<int, Clock::time_point> clearing;  // by device: the engine that copies to it
  bool hold = false;
};

Sim& sim();
using Lock = std::unique_lock<std::mutex>;

// memory.cpp
std::size_t granularity();
bool accessible(CUdeviceptr address, std::size_t nbytes);
CUresult create_memory(int device, std::size_t nbytes, bool rdma, CUmemGenericAllocationHandle& handle);
void release_memory(CUmemGenericAllocationHandle handle);
CUresult map_memory(CUdeviceptr address, CUmemGenericAllocationHandle handle);
void open_memory(const std::vector<CUdeviceptr>& mappings);
void unmap_memory(CUdeviceptr mapping);
// copies.cpp
constexpr int kToDevice = 0, kToHost = 1, kByKernel = 2;  // of `links`
Clock::duration link_time(std::size_t nbytes);
Clock::duration device_time(std::size_t nbytes);
bool is_registered(const void* data, std::size_t nbytes);
bool kernels_can_read(const void* data, std::size_t nbytes);
void engine_clears(int device, std::size_t nbytes);
// streams.cpp: all under the mutex
CUcontext current();
CUstream stream_or_default(CUstream stream);
CUresult enqueue(CUstream stream, Op op);
bool pump();
bool running_on(CUdeviceptr address, std::size_t nbytes);
bool queued_with_host(const void* data, std::size_t nbytes);
CUresult wait_for(Lock& lock, const std::function<bool()>& done);
CUresult break_captures();

}  // namespace sim

#define SIM_CHECK(condition, code) \
  do {                             \
    if (!(condition)) return code; \
  } while (0)

// Rule check, then the lock, then what an unusable driver answers to everything.
#define SIM_CALL(call)                                                                           \
  SIM_ENTER(call);                                                                               \
  ::sim::Sim& s = ::sim::sim();                                                                  \
  ::sim::Lock lock(s.mutex);                                                                     \
  SIM_CHECK(s.box != nullptr && s.pid == getpid(), CUDA_ERROR_NOT_INITIALIZED);                  \
  SIM_CHECK(s.sticky == CUDA_SUCCESS, s.sticky)
