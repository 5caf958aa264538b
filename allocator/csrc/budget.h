// One byte budget for several processes, the ranks of an engine and all engines of a box, through one file.
//
// The file is a line of text, `rotator-host-budget 1 <bytes>`, that whoever configures the box writes: rewriting or
// replacing it changes the budget. Beside it, in `<path>.rows`, each SharedBudget has a row and holds a record lock on
// a byte of it: a row whose byte is unlocked belongs to the dead and counts nothing. The locks belong to the open file
// and not to the process, so several budgets in one process are several rows, and reading the file elsewhere in the
// process drops none. All bytes are real bytes.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

namespace rotator {

// Safe to use from several threads. In a forked child what can throw throws, and the destructor does nothing.
class SharedBudget {
 public:
  struct Row {
    int64_t pid = 0;  // in its own pid namespace: for people, not for liveness
    uint64_t bytes_used = 0;
    uint64_t bytes_releasable = 0;
    uint64_t bytes_asked = 0;  // what this process waits for
  };

  // Throws Error: RA_BUDGET_FILE when the file is absent or not a budget, or its rows cannot be written.
  explicit SharedBudget(const std::string& path);
  ~SharedBudget();
  SharedBudget(const SharedBudget&) = delete;
  SharedBudget& operator=(const SharedBudget&) = delete;

  // All throw Error: RA_BUDGET_FILE when the rows cannot be locked or written.

  // False, with nothing changed, when the bytes do not fit. What is claimed is no longer asked for.
  bool claim(uint64_t nbytes);
  // Never throws; does nothing in a forked child.
  void give(uint64_t nbytes) noexcept;

  // How much of what this process claimed it could give back at once: the masters of what is awake.
  void set_releasable(uint64_t nbytes);
  // Waits for `nbytes` to become free: others see their part of it in asked(). Replaces what was asked before; 0 ends
  // it, so do claiming the bytes and the end of this process. Nothing is reserved for whoever asks.
  void ask(uint64_t nbytes);
  // What others wait for and this process should release: what the budget lacks for them, put on those who can release
  // most first, never more than this process can. A budget that was lowered below what is used asks by itself.
  uint64_t asked();

  uint64_t bytes_budget();
  uint64_t bytes_used();  // by all the living
  uint64_t bytes_free();
  std::vector<Row> rows();  // of the living
  const std::string& path() const { return path_; }

 private:
  class FileLock;
  struct Table {
    std::vector<Row> rows;  // of the living, in the file's order, which all agree on
    std::size_t own = 0;
    uint64_t bytes_used() const;
    uint64_t asked_of_own(uint64_t budget) const;
  };

  void join();
  void leave() noexcept;
  bool take_row();
  void write_row();
  Table read_table();
  void read_budget(bool strict);
  template <typename Body>
  auto locked(Body body);
  [[noreturn]] void fail(const std::string& why) const;

  const std::string path_;
  const pid_t pid_;
  std::mutex mutex_;  // all below
  int fd_ = -1;
  int row_ = -1;
  uint64_t budget_ = 0;
  Row own_;  // the truth about this process; the file repeats it
};

}  // namespace rotator
