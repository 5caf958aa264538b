// Ownership of the driver's virtual memory objects: a context in scope, a reservation of addresses, an allocation of
// device bytes. What is fallible to give back says so; destructors try once and keep quiet.
#pragma once

#include <array>
#include <cstddef>
#include <utility>

#include "csrc/driver.h"
#include "csrc/error.h"
#include "csrc/kernels.h"

namespace rotator {

// A stream of our own in a device's context.
class Stream {
 public:
  Stream() = default;
  ~Stream() { close(); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  void open(const Driver& driver, int priority);
  void close() noexcept;
  CUstream get() const { return stream_; }

 private:
  const Driver* driver_ = nullptr;
  CUstream stream_ = nullptr;
};

constexpr int kCopyStreams = 2;

// One device as this process sees it: its primary context (torch's too), our streams, its sizes.
class Device {
 public:
  Device(const Driver& driver, int index);
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  std::size_t bytes_free() const;
  // Waits for all of our streams but the background's, with the context current. Throws Error: the driver's.
  void finish() const;
  // The same on the way out of a failure, where the refusal was told already.
  void settle() const noexcept;

  const Driver& driver;
  int index;
  CUdevice handle = 0;
  CUcontext context = nullptr;
  Stream copies[kCopyStreams];
  Stream fill;        // zeroing and digests, beside the copies
  Stream disk;        // copies of masters that come from the spill directory
  Stream background;  // the lowest priority: masters taken while the engine serves
  DigestKernel digest;
  PackKernel pack;
  CopyKernel copy_kernel;  // this and the next are loaded only where kernels can read registered host memory
  UnpackKernel unpack;
  std::size_t total_bytes = 0;
  std::size_t granularity = 0;
  int numa_node = -1;
  bool unified = false;  // device and host bytes are the same RAM
  CUmemAllocationProp prop{};

 private:
  void open();
  void close() noexcept;
  std::array<const Stream*, kCopyStreams + 2> used() const { return {&copies[0], &copies[1], &fill, &disk}; }
};

class ContextScope {
 public:
  explicit ContextScope(const Device& device);
  ~ContextScope();
  ContextScope(const ContextScope&) = delete;
  ContextScope& operator=(const ContextScope&) = delete;

 private:
  const Driver& driver_;
};

// The same for paths that may not throw: undo, commit, destructors. A refused push is met again by the calls inside.
class QuietContext {
 public:
  explicit QuietContext(const Device& device) noexcept;
  ~QuietContext();
  QuietContext(const QuietContext&) = delete;
  QuietContext& operator=(const QuietContext&) = delete;

 private:
  const Driver& driver_;
  bool pushed_;
};

class Reservation {
 public:
  Reservation(const Device& device, std::size_t nbytes);
  ~Reservation();
  Reservation(const Reservation&) = delete;
  Reservation& operator=(const Reservation&) = delete;

  CUdeviceptr address() const { return address_; }
  std::size_t nbytes() const { return nbytes_; }

 private:
  const Driver& driver_;
  CUdeviceptr address_ = 0;
  std::size_t nbytes_;
};

// Device bytes behind one handle, mapped or not. `release` keeps the handle when the driver refuses to take it.
class Allocation {
 public:
  Allocation(const Device& device, std::size_t nbytes);
  ~Allocation() { release(); }
  Allocation(Allocation&& other) noexcept : driver_(other.driver_), handle_(std::exchange(other.handle_, 0)) {}
  Allocation& operator=(Allocation&&) = delete;
  Allocation(const Allocation&) = delete;
  Allocation& operator=(const Allocation&) = delete;

  CUmemGenericAllocationHandle handle() const { return handle_; }
  CUresult release() noexcept;

 private:
  const Driver& driver_;
  CUmemGenericAllocationHandle handle_ = 0;
};

}  // namespace rotator
