// Masters taken while the engine serves, and given back when other processes need the memory more.
//
// One thread. It holds the allocator's mutex only to choose a chunk and to queue its copy into staging on the device's
// lowest-priority stream, and again to put the finished master in place. Digest and host copy both come from staging,
// so a master is never torn, whatever kernels write meanwhile.
#pragma once

#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>

#include "csrc/state.h"

namespace rotator {

class Background {
 public:
  // link_share: the part of the time, in (0, 1], that copies to the host may take.
  Background(std::mutex& mutex, State& state, double link_share);
  ~Background();
  Background(const Background&) = delete;
  Background& operator=(const Background&) = delete;

  // Goes through all awake segments of `tags` once. One that runs already starts again from the first segment.
  void start(uint32_t tags);
  ra_prepare_state status() const;

  // While one of these exists nothing of the background touches the device, nor holds memory there. Take it before the
  // allocator's mutex.
  class Pause {
   public:
    explicit Pause(Background& background);
    ~Pause();
    Pause(const Pause&) = delete;
    Pause& operator=(const Pause&) = delete;

   private:
    Background& background_;
  };

 private:
  struct Job;
  struct Staging;

  enum class Outcome { kGoOn, kDone, kNeedsRoom };

  void run();
  void keep_promises();
  void work();
  bool enter();
  void leave(double seconds);
  Outcome copy_chunks(Device*& needs_room);
  Outcome step(Staging& staging);
  std::optional<Job> choose(Staging& staging);
  void begin(Job& job, Staging& staging);
  bool differs(Job& job, Staging& staging);
  bool copy(Job& job, Staging& staging);
  void finish(Job& job);
  void give_back(Job& job);
  void grow(Device& device);
  void pace(double busy_seconds);
  void end(int code, const char* message);
  bool interrupted() const;
  uint32_t tags() const;

  std::mutex& mutex_;  // the allocator's
  State& state_;
  const double link_share_;
  CUdeviceptr cursor_ = 0;  // where the next chunk is looked for
  std::size_t cursor_chunk_ = 0;
  bool host_is_full_ = false;  // so what is left goes to disk

  mutable std::mutex own_;  // all below; never held while taking mutex_
  mutable std::condition_variable changed_;
  uint32_t tags_ = 0;
  bool restart_ = false;
  bool stopping_ = false;
  bool on_device_ = false;  // staging exists
  unsigned pauses_ = 0;
  ra_prepare_state status_{};
  std::optional<std::thread> thread_;
};

}  // namespace rotator
