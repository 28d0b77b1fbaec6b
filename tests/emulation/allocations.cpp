// Records what PyTorch allocates on the CPU, exact to the byte.
#include <c10/core/CPUAllocator.h>

#include <cstdint>
#include <map>
#include <mutex>

namespace {

struct Records {
  std::mutex mutex;
  std::map<std::uintptr_t, std::size_t> bytes;  // by the first address
};

Records& records() {
  static Records* const all = new Records;  // tensors may outlive this library's statics
  return *all;
}

c10::Allocator* allocator() {
  static c10::Allocator* const of_pytorch = c10::GetCPUAllocator();
  return of_pytorch;
}

void release(void* data) {
  {
    const std::lock_guard<std::mutex> lock(records().mutex);
    records().bytes.erase(reinterpret_cast<std::uintptr_t>(data));
  }
  allocator()->raw_deleter()(data);
}

class Recorder final : public c10::Allocator {
 public:
  c10::DataPtr allocate(std::size_t bytes) override {
    void* const data = allocator()->raw_allocate(bytes);
    if (data != nullptr) {
      const std::lock_guard<std::mutex> lock(records().mutex);
      records().bytes[reinterpret_cast<std::uintptr_t>(data)] = bytes;
    }
    return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t count) const override {
    default_copy_data(to, from, count);
  }
};

const bool is_installed = [] {
  allocator();
  static Recorder recorder;
  c10::SetCPUAllocator(&recorder);
  return true;
}();

}  // namespace

// Writes the first address and the end of the memory around `address`. Returns whether there is
// any.
extern "C" __attribute__((visibility("default"))) bool cuda_emulation_memory_around(
    std::uintptr_t address, std::uintptr_t* first, std::uintptr_t* end) {
  const std::lock_guard<std::mutex> lock(records().mutex);
  auto next = records().bytes.upper_bound(address);
  if (next == records().bytes.begin()) return false;
  --next;
  *first = next->first;
  *end = next->first + next->second;
  return address < *end;
}
