#include <unistd.h>

#include <algorithm>
#include <optional>

#include "sim/sim.h"

namespace sim {

Sim& sim() {
  static Sim* const one = new Sim;
  return *one;
}

static thread_local std::vector<CUcontext> context_stack;

CUcontext current() { return context_stack.empty() ? nullptr : context_stack.back(); }

constexpr int kPriorityLeast = 0, kPriorityGreatest = -5;

static CUstream make_stream(int priority) {
  Sim& s = sim();
  CUstream stream = new CUstream_st;
  stream->device = current()->device;
  stream->priority = std::clamp(priority, kPriorityGreatest, kPriorityLeast);
  s.streams.insert(stream);
  auto later = [](int mine, CUstream other) { return mine < other->priority; };
  s.by_priority.insert(std::upper_bound(s.by_priority.begin(), s.by_priority.end(), stream->priority, later), stream);
  return stream;
}

CUstream stream_or_default(CUstream stream) {
  Sim& s = sim();
  if (stream != nullptr) return s.streams.count(stream) != 0 ? stream : nullptr;
  if (current() == nullptr) return nullptr;
  CUstream& legacy = s.default_streams[current()->device];
  if (legacy == nullptr) legacy = make_stream(0);
  return legacy;
}

CUresult enqueue(CUstream stream, Op op) {
  if (stream->capturing) return CUDA_SUCCESS;  // into the graph, which nobody launches here
  op.queued_at = Clock::now();
  stream->ops.push_back(std::move(op));
  pump();
  return sim().sticky;
}

static bool may_start(const Op& op) {
  if (op.held && sim().hold) return false;
  return !op.awaited || op.awaited->pending == 0;
}

static CUresult run(const std::function<CUresult()>& part) {
  const CUresult result = part ? part() : CUDA_SUCCESS;
  if (result != CUDA_SUCCESS) sim().sticky = result;
  return result;
}

static void start(CUstream_st& stream, Op& op) {
  op.started = true;
  Clock::time_point from = std::max(op.queued_at, stream.ready_at);
  // What was held or awaited something cannot have started before this moment; queued work simply follows on.
  if (op.held || op.awaited) from = Clock::now();
  if (op.link != nullptr) from = std::max(from, *op.link);
  if (op.wire != nullptr) from = std::max(from, *op.wire);
  op.done_at = from + op.cost;
  if (op.wire != nullptr) *op.wire = op.done_at;  // what an engine does besides leaves the wire to others
  // The engine takes turns: a small copy waits for a turn of clearing, a large one for as long again as it lasts itself.
  constexpr std::chrono::milliseconds kTurn{2};
  if (op.clearing != nullptr && *op.clearing > from)
    op.done_at += std::min<Clock::duration>(*op.clearing - from, std::max<Clock::duration>(kTurn, op.cost));
  if (op.link != nullptr) *op.link = op.done_at;
  run(op.begun);
}

// Runs the front of one stream when its time has come.
static bool step(CUstream_st& stream, Clock::time_point now) {
  if (stream.ops.empty()) return false;
  Op& op = stream.ops.front();
  if (!op.started && !may_start(op)) return false;
  if (!op.started) start(stream, op);
  run(op.always);
  if (op.done_at > now) return false;
  run(op.effect);
  stream.ready_at = op.done_at;
  stream.ops.pop_front();
  return true;
}

bool pump() {
  bool any = false;
  for (bool progress = true; progress;) {
    progress = false;
    for (CUstream stream : sim().by_priority) progress |= step(*stream, Clock::now());
    any |= progress;
  }
  if (any) sim().changed.notify_all();
  return any;
}

bool running_on(CUdeviceptr address, std::size_t nbytes) {
  for (CUstream stream : sim().streams) {
    if (stream->ops.empty()) continue;
    const Op& op = stream->ops.front();
    auto meets = [&](const Span& span) { return span.meets(address, nbytes); };
    if (op.started && std::any_of(op.touches.begin(), op.touches.end(), meets)) return true;
  }
  return false;
}

// Also what has not started: once queued, nobody can call it back.
bool queued_with_host(const void* data, std::size_t nbytes) {
  const auto address = reinterpret_cast<CUdeviceptr>(data);
  for (CUstream stream : sim().streams)
    for (const Op& op : stream->ops)
      if (op.host.meets(address, nbytes)) return true;
  return false;
}

static std::optional<Clock::time_point> next_due() {
  std::optional<Clock::time_point> due;
  for (CUstream stream : sim().streams) {
    if (stream->ops.empty() || !stream->ops.front().started) continue;
    const auto at = stream->ops.front().done_at;
    due = due ? std::min(*due, at) : at;
  }
  return due;
}

CUresult wait_for(Lock& lock, const std::function<bool()>& done) {
  for (;;) {
    pump();
    if (sim().sticky != CUDA_SUCCESS) return sim().sticky;
    if (done()) return CUDA_SUCCESS;
    const auto due = next_due();
    if (due) sim().changed.wait_until(lock, *due);
    else sim().changed.wait(lock);
  }
}

static thread_local int capture_mode = 0;  // global; 1: this thread's captures alone; 2: none, at its own risk

// A call that a capture forbids answers so and spoils every capture of the process.
CUresult break_captures() {
  if (capture_mode == kCaptureModeRelaxed) return CUDA_SUCCESS;
  bool capturing = false;
  for (CUstream stream : sim().streams) {
    if (!stream->capturing) continue;
    stream->capture_broken = true;
    capturing = true;
  }
  return capturing ? CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED : CUDA_SUCCESS;
}

static Op marker(const std::shared_ptr<Mark>& mark) {
  ++mark->pending;
  Op op;
  op.effect = [mark] {
    --mark->pending;
    return CUDA_SUCCESS;
  };
  return op;
}

static std::shared_ptr<Mark> record(CUevent event) { return event->latest = std::make_shared<Mark>(); }

}  // namespace sim

using namespace sim;

SIM_EXPORT CUresult cuCtxPushCurrent_v2(CUcontext context) {
  SIM_CALL("cuCtxPushCurrent");
  SIM_CHECK(context != nullptr && context->references > 0, CUDA_ERROR_INVALID_CONTEXT);
  context_stack.push_back(context);
  return CUDA_SUCCESS;
}

SIM_EXPORT CUresult cuCtxPopCurrent_v2(CUcontext* context) {
  // Popping cannot fail while something was pushed, so no rule applies: it would only break the rules' own counting.
  SIM_CHECK(!context_stack.empty(), CUDA_ERROR_INVALID_CONTEXT);
  if (context != nullptr) *context = context_stack.back();
  context_stack.pop_back();
  return CUDA_SUCCESS;
}

SIM_EXPORT CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = current();
  return CUDA_SUCCESS;
}

SIM_EXPORT CUresult cuCtxSetCurrent(CUcontext context) {
  SIM_CALL("cuCtxSetCurrent");
  context_stack.clear();
  if (context != nullptr) context_stack.push_back(context);
  return CUDA_SUCCESS;
}

SIM_EXPORT CUresult cuCtxSynchronize() {
  SIM_CALL("cuCtxSynchronize");
  SIM_CHECK(current() != nullptr, CUDA_ERROR_INVALID_CONTEXT);
  if (const CUresult broken = break_captures()) return broken;
  const int device = current()->device;
  return wait_for(lock, [&] {
    return std::all_of(s.streams.begin(), s.streams.end(),
                       [&](CUstream stream) { return stream->device != device || stream->ops.empty(); });
  });
}

SIM_EXPORT CUresult cuCtxGetStreamPriorityRange(int* least, int* greatest) {
  SIM_CALL("cuCtxGetStreamPriorityRange");
  SIM_CHECK(current() != nullptr, CUDA_ERROR_INVALID_CONTEXT);
  if (least != nullptr) *least = kPriorityLeast;
  if (greatest != nullptr) *greatest = kPriorityGreatest;
  return CUDA_SUCCESS;
}

SIM_EXPORT CUresult cuStreamCreate(CUstream* stream, unsigned) {
  SIM_CALL("cuStreamCreate");
  SIM_CHECK(current() != nullptr, CUDA_ERROR_INVALID_CONTEXT);
  *stream = make_stream(0);
  return CUDA_SUCCESS;
}

SIM_EXPORT CUresult cuStreamCreateWithPriority(CUstream* stream, unsigned, int priority) {
  SIM_CALL("cuStreamCreateWithPriority");
  SIM_CHECK(current() != nullptr, CUDA_ERROR_INVALID_CONTEXT);
  *stream = make_stream(priority);
  return CUDA_SUCCESS;
}

SIM_EXPORT CUresult cuStreamDestroy_v2(CUstream stream) {
  SIM_CALL("cuStreamDestroy");
  SIM_CHECK(s.streams.count(stream) != 0, CUDA_ERROR_INVALID_HANDLE);
  const CUresult result = wait_for(lock, [&] { return stream->ops.empty(); });
  s.streams.erase(stream);
  s.by_priority.erase(std::find(s.by_priority.begin(), s.by_priority.end(), stream));
  delete stream;
  return result;
}

SIM_EXPORT CUresult cuStreamSynchronize(CUstream stream) {
  SIM_CALL("cuStreamSynchronize");
  stream = stream_or_default(stream);
  SIM_CHECK(stream != nullptr, CUDA_ERROR_INVALID_HANDLE);
  if (stream->capturing) return break_captures();
  return wait_for(lock, [&] { return stream->ops.empty(); });
}

SIM_EXPORT CUresult cuStreamQuery(CUstream stream) {
  SIM_CALL("cuStreamQuery");
  stream = stream_or_default(stream);
  SIM_CHECK(stream != nullptr, CUDA_ERROR_INVALID_HANDLE);
  pump();
  return stream->ops.empty() ? s.sticky : CUDA_ERROR_NOT_READY;
}

SIM_EXPORT CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned) {
  SIM_CALL("cuStreamWaitEvent");
  stream = stream_or_default(stream);
  SIM_CHECK(stream != nullptr && s.events.count(event) != 0, CUDA_ERROR_INVALID_HANDLE);
  Op op;
  op.awaited = s.events.at(event)->latest;
  return enqueue(stream, std::move(op));
}

SIM_EXPORT CUresult cuStreamBeginCapture_v2(CUstream stream, int) {
  SIM_CALL("cuStreamBeginCapture");
  SIM_CHECK(s.streams.count(stream) != 0 && !stream->capturing, CUDA_ERROR_INVALID_HANDLE);
  stream->capturing = true;
  stream->capture_broken = false;
  return CUDA_SUCCESS;
}

SIM_EXPORT CUresult cuStreamEndCapture(CUstream stream, void** graph) {
  SIM_CALL("cuStreamEndCapture");
  SIM_CHECK(s.streams.count(stream) != 0 && stream->capturing, CUDA_ERROR_INVALID_HANDLE);
  stream->capturing = false;
  *graph = nullptr;
  return stream->capture_broken ? CUDA_ERROR_STREAM_CAPTURE_INVALIDATED : CUDA_SUCCESS;
}

SIM_EXPORT CUresult cuStreamIsCapturing(CUstream stream, int* status) {
  SIM_CALL("cuStreamIsCapturing");
  SIM_CHECK(s.streams.count(stream) != 0, CUDA_ERROR_INVALID_HANDLE);
  *status = !stream->capturing ? 0 : stream->capture_broken ? 2 : 1;
  return CUDA_SUCCESS;
}

SIM_EXPORT CUresult cuThreadExchangeStreamCaptureMode(int* mode) {
  SIM_CALL("cuThreadExchangeStreamCaptureMode");
  SIM_CHECK(*mode >= 0 && *mode <= kCaptureModeRelaxed, CUDA_ERROR_INVALID_VALUE);
  std::swap(*mode, capture_mode);
  return CUDA_SUCCESS;
}

SIM_EXPORT CUresult cuEventCreate(CUevent* event, unsigned) {
  SIM_CALL("cuEventCreate");
  SIM_CHECK(current() != nullptr, CUDA_ERROR_INVALID_CONTEXT);
  auto created = std::make_unique<CUevent_st>();
  created->device = current()->device;
  *event = created.get();
  s.events.emplace(*event, std::move(created));
  return CUDA_SUCCESS;
}

SIM_EXPORT CUresult cuEventDestroy_v2(CUevent event) {
  SIM_CALL("cuEventDestroy");
  return s.events.erase(event) != 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

SIM_EXPORT CUresult cuEventRecord(CUevent event, CUstream stream) {
  SIM_CALL("cuEventRecord");
  stream = stream_or_default(stream);
  SIM_CHECK(stream != nullptr && s.events.count(event) != 0, CUDA_ERROR_INVALID_HANDLE);
  SIM_CHECK(stream->device == event->device, CUDA_ERROR_INVALID_HANDLE);
  if (stream->capturing) return CUDA_SUCCESS;  // a node of the graph, as any other work
  return enqueue(stream, marker(record(event)));
}

SIM_EXPORT CUresult cuCtxRecordEvent(CUcontext context, CUevent event) {
  SIM_CALL("cuCtxRecordEvent");
  SIM_CHECK(context != nullptr && s.events.count(event) != 0, CUDA_ERROR_INVALID_HANDLE);
  SIM_CHECK(context->device == event->device, CUDA_ERROR_INVALID_HANDLE);
  if (const CUresult broken = break_captures()) return broken;
  pump();
  const auto mark = record(event);
  for (CUstream stream : s.streams)
    if (stream->device == context->device && !stream->ops.empty()) stream->ops.push_back(marker(mark));
  return s.sticky;
}

SIM_EXPORT CUresult cuEventQuery(CUevent event) {
  SIM_CALL("cuEventQuery");
  SIM_CHECK(s.events.count(event) != 0, CUDA_ERROR_INVALID_HANDLE);
  if (const CUresult broken = break_captures()) return broken;
  pump();
  SIM_CHECK(s.sticky == CUDA_SUCCESS, s.sticky);
  return s.events.at(event)->latest->pending == 0 ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}

SIM_EXPORT CUresult cuEventSynchronize(CUevent event) {
  SIM_CALL("cuEventSynchronize");
  SIM_CHECK(s.events.count(event) != 0, CUDA_ERROR_INVALID_HANDLE);
  const auto awaited = s.events.at(event)->latest;
  return wait_for(lock, [&] { return awaited->pending == 0; });
}
