// Memory in which the blocks of one launch leave each other numbers. All bytes are 0xFF while no
// kernel runs: a kernel waits for what is not 0xFF and leaves 0xFF behind.
//
// One for each device, stream and graph capture, kept for good (some 200 KB): launches that share
// one never overlap, whatever stream a graph is replayed on. Made at the first call and when a call
// needs more, for which the host waits; a capture is not disturbed and records nothing of it.
#pragma once

#include "cuda/launch.h"
#include "cuda/multi_lora.h"  // capture_id

#ifdef FUSEDPEFT_SIMT
namespace fusedpeft::cuda {
unsigned* workspace(std::size_t words, cudaStream_t stream);  // the test's own
}
#else
#include <map>
#include <mutex>
#include <tuple>

namespace fusedpeft::cuda {

inline unsigned* workspace(std::size_t words, cudaStream_t stream) {
  const auto checked = [](cudaError_t error) { check_launch("workspace", error); };
  struct Held {
    unsigned* data = nullptr;
    std::size_t words = 0;
  };
  static std::mutex mutex;
  static auto& all = *new std::map<std::tuple<int, cudaStream_t, uint64_t>, Held>;
  int device = 0;
  checked(cudaGetDevice(&device));
  const uint64_t capture = capture_id(stream);
  const std::lock_guard<std::mutex> lock(mutex);
  Held& held = all[{device, stream, capture}];
  if (held.words >= words) return held.data;
  std::size_t size = 1 << 14;
  while (size < words) size *= 2;
  struct Relaxed {  // allows what follows while this or another thread captures
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode); }
    ~Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode); }
  } relaxed;
  unsigned* data = nullptr;
  cudaStream_t own = nullptr;
  checked(cudaMalloc(&data, size * sizeof *data));
  checked(cudaStreamCreateWithFlags(&own, cudaStreamNonBlocking));
  checked(cudaMemsetAsync(data, 0xFF, size * sizeof *data, own));
  checked(cudaStreamSynchronize(own));
  checked(cudaStreamDestroy(own));
  held = {data, size};  // a smaller one stays where graphs and running kernels have its address
  return data;
}

}  // namespace fusedpeft::cuda
#endif
