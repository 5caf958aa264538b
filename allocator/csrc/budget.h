// One byte budget for several processes, the ranks of an engine and all engines of a box, through one file.
//
// The file's first line is text, `rotator-host-budget 1 <bytes>`, and whoever configures the box writes it; rewriting it
// changes the budget. Rows follow at a fixed offset. Each SharedBudget has a row and holds a record lock on a byte of
// it: a row whose byte is unlocked belongs to the dead and counts nothing. The locks belong to the open file, so several
// budgets in one process are several rows; forked children close it, so that they do not keep a dead parent's row.
// All bytes are real bytes.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

namespace rotator {

// Safe to use from several threads. In a forked child every call throws, and the destructor does nothing.
class SharedBudget {
 public:
  struct Row {
    int64_t pid = 0;  // in its own pid namespace: for people, not for liveness
    uint64_t bytes_used = 0;
    uint64_t bytes_releasable = 0;
    uint64_t bytes_asked = 0;  // what this process waits for
  };

  // Throws Error: RA_BUDGET_FILE when the file is absent, cannot be written, or is not a budget.
  explicit SharedBudget(const std::string& path);
  ~SharedBudget();
  SharedBudget(const SharedBudget&) = delete;
  SharedBudget& operator=(const SharedBudget&) = delete;

  // False, with nothing changed, when the bytes do not fit. What is claimed is no longer asked for.
  bool claim(uint64_t nbytes);
  void give(uint64_t nbytes);

  // How much of what this process claimed it could give back at once: the masters of what is awake.
  void set_releasable(uint64_t nbytes);
  // Waits for `nbytes` to become free: others see their part of it in asked(). Replaces what was asked before, 0 ends it.
  // Ends by itself when the bytes are claimed, and when this process dies. Nothing is reserved for whoever asks.
  void ask(uint64_t nbytes);
  // What others wait for and this process should release: what the budget lacks for them, put on those who can release
  // most first, never more than this process can.
  uint64_t asked();

  uint64_t bytes_budget();
  uint64_t bytes_used();  // by all the living
  uint64_t bytes_free();
  std::vector<Row> rows();  // of the living, this one first
  const std::string& path() const { return path_; }

 private:
  class FileLock;
  struct Table {
    uint64_t bytes_budget = 0;
    std::vector<Row> rows;  // of the living, in the file's order
    std::size_t own = 0;
    uint64_t bytes_used() const;
    uint64_t bytes_free() const;
  };

  void join();
  void rejoin_if_replaced();
  void take_row();
  bool alive(int row) const;
  uint64_t read_budget() const;
  void write_row();
  Table read_table();
  template <typename Body>
  auto locked(Body body);
  [[noreturn]] void fail(const std::string& why) const;

  const std::string path_;
  const pid_t pid_;
  std::mutex mutex_;
  int fd_ = -1;
  int row_ = -1;
  Row own_;  // the truth about this process; the file repeats it
};

}  // namespace rotator
