#include "csrc/budget.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <memory>
#include <new>
#include <thread>

#include "check.h"

using check::Child;
using check::error_of;
using check::folder;
using check::write_file;
using rotator::SharedBudget;

static std::string budget_of(uint64_t nbytes) {
  return write_file("budget", "rotator-host-budget 1 " + std::to_string(nbytes) + "\n");
}

TEST("budget", "a file that is absent, garbage or beside a folder that cannot be written is a clear error") {
  const rotator::Error absent = error_of([] { SharedBudget(folder() + "/absent"); });
  CHECK(absent.code == RA_BUDGET_FILE && absent.message.find("rotator-host-budget 1") != std::string::npos);
  for (const char* text : {"", "\n", "hello\n", "rotator-host-budget 2 5\n", "rotator-host-budget 1 x\n",
                           "rotator-host-budget 1 12"})
    CHECK(error_of([&] { SharedBudget(write_file("garbage", text)); }).code == RA_BUDGET_FILE);
  const std::string path = budget_of(100);
  CHECK(mkdir((path + ".rows").c_str(), 0700) == 0);
  CHECK(error_of([&] { SharedBudget{path}; }).code == RA_BUDGET_FILE);
}

TEST("budget", "two processes never hold more than the budget together") {
  const std::string path = budget_of(100);
  SharedBudget ours(path);
  CHECK(ours.claim(60));
  Child child([&](Child& parent) {
    SharedBudget theirs(path);
    CHECK(!theirs.claim(41));
    CHECK(theirs.claim(40));
    parent.say();
    parent.listen();
    theirs.give(40);
    parent.say();
    parent.listen();
  });
  child.listen();
  CHECK(ours.bytes_used() == 100);
  CHECK(!ours.claim(1));
  child.tell();
  child.listen();
  CHECK(ours.claim(1));
  child.tell();
  CHECK(child.succeeds());
}

TEST("budget", "what a process that was killed held counts nothing") {
  const std::string path = budget_of(100);
  Child child([&](Child& parent) {
    SharedBudget theirs(path);
    CHECK(theirs.claim(100));
    theirs.ask(50);
    parent.say();
    parent.listen();
  });
  SharedBudget ours(path);
  child.listen();
  CHECK(!ours.claim(1));
  child.kill_hard();
  CHECK(ours.bytes_used() == 0);
  CHECK(ours.asked() == 0);
  CHECK(ours.claim(100));
}

TEST("budget", "a child that outlives the process that forked it holds nothing of it") {
  const std::string path = budget_of(100);
  pid_t orphan = 0;
  int tube[2];
  CHECK(pipe(tube) == 0);
  Child child([&](Child& parent) {
    SharedBudget theirs(path);
    CHECK(theirs.claim(100));
    const pid_t grandchild = fork();
    if (grandchild == 0) {
      // It may not use the budget, and its end of scope changes nothing.
      const bool refused = error_of([&] { theirs.claim(0); }).code == RA_BUDGET_FILE;
      const pid_t self = getpid();
      CHECK(write(tube[1], &self, sizeof self) == sizeof self && refused);
      for (;;) pause();
    }
    parent.say();
    parent.listen();
  });
  SharedBudget ours(path);
  child.listen();
  CHECK(read(tube[0], &orphan, sizeof orphan) == sizeof orphan);
  CHECK(ours.bytes_used() == 100);
  child.kill_hard();
  const uint64_t used = ours.bytes_used();
  kill(orphan, SIGKILL);
  CHECK(used == 0);
}

TEST("budget", "two budgets in one process are two rows, and reading the file drops neither") {
  const std::string path = budget_of(100);
  SharedBudget one(path);
  {
    SharedBudget two(path);
    CHECK(one.claim(60));
    CHECK(two.claim(30));
    for (const char* suffix : {"", ".rows"}) close(open((path + suffix).c_str(), O_RDONLY));
    CHECK(one.bytes_used() == 90 && two.rows().size() == 2);
    Child child([&](Child&) {
      SharedBudget theirs(path);
      CHECK(theirs.bytes_used() == 90);
    });
    CHECK(child.succeeds());
  }
  CHECK(one.bytes_used() == 60);
}

TEST("budget", "what is asked for is put on whoever can release most, and never on the one who asks") {
  const std::string path = budget_of(100);
  SharedBudget small(path), large(path), asker(path);
  CHECK(small.claim(30) && large.claim(50) && asker.claim(20));
  small.set_releasable(30);
  large.set_releasable(40);
  asker.set_releasable(20);
  asker.ask(10);
  CHECK(large.asked() == 10 && small.asked() == 0 && asker.asked() == 0);
  asker.ask(60);
  CHECK(large.asked() == 40 && small.asked() == 20);
  // What they release counts, whoever of them does.
  small.give(30);
  CHECK(large.asked() == 30 && small.asked() == 0);
  large.give(30);
  CHECK(large.asked() == 0);
  CHECK(asker.claim(60));
  large.set_releasable(20);
  CHECK(large.asked() == 0);
}

TEST("budget", "one who asks is not asked himself, even if he could release most") {
  SharedBudget holder(budget_of(100)), asker(holder.path());
  CHECK(holder.claim(30) && asker.claim(70));
  holder.set_releasable(30);
  asker.set_releasable(70);
  asker.ask(20);
  CHECK(holder.asked() == 20 && asker.asked() == 0);
}

TEST("budget", "claims wait for whoever holds the table") {
  SharedBudget budget(budget_of(100));
  Child child([&](Child& parent) {
    const int rows = open((budget.path() + ".rows").c_str(), O_RDWR);
    struct flock lock {};
    lock.l_type = F_WRLCK;
    lock.l_len = 1;
    CHECK(fcntl(rows, F_SETLK, &lock) == 0);
    parent.say();
    parent.listen();
  });
  child.listen();
  std::atomic<bool> claimed{false};
  std::thread claimer([&] { claimed = budget.claim(1); });
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  const bool early = claimed;
  child.tell();
  claimer.join();
  CHECK(!early && claimed);
}

TEST("budget", "asking ends with its claim, with zero and with the process") {
  const std::string path = budget_of(100);
  SharedBudget holder(path);
  CHECK(holder.claim(90));
  holder.set_releasable(90);
  {
    SharedBudget asker(path);
    asker.ask(30);
    CHECK(holder.asked() == 20);
    asker.ask(0);
    CHECK(holder.asked() == 0);
    asker.ask(30);
    holder.give(20);
    CHECK(asker.claim(30));
    CHECK(holder.asked() == 0);
    asker.ask(5);
    CHECK(holder.asked() == 5);
  }
  CHECK(holder.asked() == 0);
}

TEST("budget", "rewriting or replacing the file changes the budget, and a lower one asks by itself") {
  const std::string path = budget_of(100);
  SharedBudget holder(path);
  CHECK(holder.claim(80));
  holder.set_releasable(80);
  budget_of(50);
  CHECK(holder.bytes_budget() == 50 && holder.bytes_free() == 0);
  CHECK(holder.asked() == 30);
  CHECK(!holder.claim(1));
  CHECK(rename(write_file("next", "rotator-host-budget 1 200\n").c_str(), path.c_str()) == 0);
  CHECK(holder.claim(120));
  // While it is being rewritten the last word holds.
  write_file("budget", "rotator-host-");
  CHECK(holder.bytes_budget() == 200);
}

TEST("budget", "rows that somebody removed or cut short are written again") {
  const std::string path = budget_of(100);
  SharedBudget one(path), two(path);
  CHECK(one.claim(40) && two.claim(40));
  CHECK(truncate((path + ".rows").c_str(), 0) == 0);
  CHECK(!one.claim(61) && !two.claim(61));
  CHECK(one.claim(0) && two.claim(0));
  CHECK(one.bytes_used() == 80);
  CHECK(unlink((path + ".rows").c_str()) == 0);
  CHECK(one.claim(0) && two.claim(0));
  CHECK(one.bytes_used() == 80 && SharedBudget(path).bytes_used() == 80);
}

TEST("budget", "threads and processes that claim and give at once keep to the budget") {
  const std::string path = budget_of(1000);
  void* page = mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  CHECK(page != MAP_FAILED);
  auto& held = *new (page) std::atomic<int64_t>(0);
  const auto work = [&](SharedBudget& budget, unsigned seed) {
    for (int i = 0; i < 150; ++i) {
      seed = seed * 1664525 + 1013904223;
      const uint64_t nbytes = seed >> 23;
      if (!budget.claim(nbytes)) continue;
      CHECK((held += static_cast<int64_t>(nbytes)) <= 1000);
      held -= static_cast<int64_t>(nbytes);
      budget.give(nbytes);
    }
  };
  std::vector<std::unique_ptr<Child>> children;
  for (unsigned i = 0; i < 3; ++i)
    children.push_back(std::make_unique<Child>([&, i](Child&) {
      SharedBudget budget(path);
      std::thread other(work, std::ref(budget), i + 100);
      work(budget, i);
      other.join();
    }));
  for (auto& child : children) CHECK(child->succeeds());
  CHECK(SharedBudget(path).bytes_used() == 0);
}
