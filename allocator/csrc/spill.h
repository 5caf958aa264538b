// Masters over budget, in a directory: one file that has no name, so that nothing is left however the process dies.
// Written and read past the page cache by a few threads in chunks, checked against the digest of what was written.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "csrc/digest.h"

namespace rotator {

// The calls that move bytes, so that tests can make them short, interrupted or wrong.
struct FileCalls {
  ssize_t (*read)(int fd, void* data, std::size_t nbytes, off_t offset);
  ssize_t (*write)(int fd, const void* data, std::size_t nbytes, off_t offset);
  int (*allocate)(int fd, int mode, off_t offset, off_t nbytes);
};
FileCalls file_calls();

struct SpillOptions {
  std::string directory;
  uint64_t budget_bytes = 0;  // bound on the file's slots, 0 for none
  // On an H200 machine's disk 8 threads with 1 MiB wrote 3.1 and read and verified 3.8 GiB/s, 8 with 4 MiB 3.0 and 2.5,
  // one with 4 MiB 2.7 and 1.6 (2026-11-21).
  unsigned threads = 8;
  std::size_t chunk_bytes = std::size_t{1} << 20;  // one read or write; a multiple of 4 KiB
  FileCalls calls = file_calls();
};

struct SpillSlot {
  uint64_t offset = 0;
  uint64_t nbytes = 0;  // of content
  Digest digest;        // of all of it, as digest_of() gives it
};

// Safe to use from several threads. In a forked child every call throws, and the destructor does nothing.
class SpillStore {
 public:
  class Request;
  // A read or write under way. Its memory must stay until wait().
  using Ticket = std::shared_ptr<Request>;

  // Throws Error: RA_HOST_MEMORY when the directory cannot be written.
  explicit SpillStore(const SpillOptions& options);
  // Gives up what has not begun and waits for the rest. Nobody may be waiting.
  ~SpillStore();
  SpillStore(const SpillStore&) = delete;
  SpillStore& operator=(const SpillStore&) = delete;

  // `digest` is what a read will be checked against. Throws Error: RA_HOST_MEMORY when the disk or the budget is full,
  // naming the directory; then nothing is taken.
  SpillSlot write(const void* data, std::size_t nbytes, const Digest& digest);
  // Throws Error: RA_MASTER_LOST when what is read is not what was written, or cannot be read at all.
  void read(const SpillSlot& slot, void* data, std::size_t nbytes);

  // The same in the background. Blocks while too many are under way. Memory aligned to 4 KiB is read and written
  // without another copy. A slot may be given back only when nothing of it is under way.
  Ticket start_write(const void* data, std::size_t nbytes, const Digest& digest);
  Ticket start_read(const SpillSlot& slot, void* data);
  // Returns the slot, throws as write and read. A write that failed has given its slot back.
  SpillSlot wait(const Ticket& ticket);

  // The slot's bytes go back to the file system.
  void give(const SpillSlot& slot);

  uint64_t bytes_used() const;  // by slots, in whole blocks of 4 KiB
  bool is_direct() const;       // past the page cache
  bool is_memory() const;       // the directory lies in a file system of memory: spilling there frees nothing
  const std::string& directory() const;

 private:
  class Store;
  Store& store() const;
  pid_t pid_;
  std::unique_ptr<Store> store_;
};

}  // namespace rotator
