// A test is a sentence and a body. Each runs in a process of its own, so that it may lower its limits, fork and crash.
#pragma once

#include <sys/types.h>

#include <functional>
#include <string>
#include <vector>

#include "csrc/error.h"

namespace check {

struct Test {
  const char* group;
  const char* sentence;
  void (*body)();
};

std::vector<Test>& tests();

struct Registration {
  Registration(const char* group, const char* sentence, void (*body)()) { tests().push_back({group, sentence, body}); }
};

[[noreturn]] void fail(const char* file, int line, const std::string& what);

// The Error that `body` throws; fails the test when it throws none.
rotator::Error error_of(const std::function<void()>& body);

// A folder of its own for each test, removed with it.
const std::string& folder();
std::string write_file(const std::string& path, const std::string& text);  // below folder(); returns the whole path

// A forked process that says a byte when it gets somewhere. Killed when it goes out of scope.
class Child {
 public:
  explicit Child(const std::function<void(Child&)>& body);
  ~Child();
  Child(const Child&) = delete;
  Child& operator=(const Child&) = delete;
  void say() const;      // in the child
  void listen() const;   // for the other's next byte; fails after 20 s, or when the other is gone
  void tell() const;     // to the child
  void kill_hard();
  bool succeeds();       // waits for the end: true when the body returned
  pid_t pid = -1;

 private:
  int to_child_[2];
  int to_parent_[2];
};

}  // namespace check

#define CHECK(condition)                                             \
  do {                                                               \
    if (!(condition)) ::check::fail(__FILE__, __LINE__, #condition); \
  } while (0)

#define CHECK_NAME_(a, b) a##b
#define CHECK_NAME(a, b) CHECK_NAME_(a, b)
#define TEST(group, sentence)                                                                                   \
  static void CHECK_NAME(test_, __LINE__)();                                                                    \
  static const ::check::Registration CHECK_NAME(registered_, __LINE__)(group, sentence, CHECK_NAME(test_, __LINE__)); \
  static void CHECK_NAME(test_, __LINE__)()
