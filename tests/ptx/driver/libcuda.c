// A stand-in for libcuda.so.1, the CUDA driver: the calls that Triton 3.6 to 3.9 make.

// It has one device, loads PTX text and hands each launch to the process that loaded it. There is
// no memory of a device: its pointers are those of the process. library.py builds and calls it.

#include <cuda.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define VERSION 13020         // later than the drivers whose tensor maps Triton corrects by hand
#define WITHOUT_ASKING 49152  // bytes of dynamic shared memory that any launch may have
#define MOST_SHARED_MODE 17   // attribute of functions that only compute capability 10.7 has

static char message[512] = "no error";

static CUresult refuse(const char* format, ...) {
  va_list values;
  va_start(values, format);
  vsnprintf(message, sizeof(message), format, values);
  va_end(values);
  return CUDA_ERROR_INVALID_VALUE;
}

CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = error == CUDA_SUCCESS ? "no error" : message;
  return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int* version) {
  *version = VERSION;
  return CUDA_SUCCESS;
}

// --- What the process sets ---

typedef struct {
  int major, minor;
  int multiprocessors;
  int shared_of_block, shared_of_multiprocessor;  // bytes
} Device;

// Returns a number for a module of this PTX.
typedef long (*Loaded)(const char* ptx);
// Returns a number for the module's function of this name, 0 if there is none.
typedef long (*Found)(long module, const char* name);
// Returns 0 if the launch failed.
typedef int (*Launched)(long function, const unsigned* grid, const unsigned* block, unsigned shared,
                        void** parameters);

static Device device;
static Loaded loaded;
static Found found;
static Launched launched;
static long tensor_maps;

void stand_in_device(const Device* of) { device = *of; }

void stand_in_callbacks(Loaded of_module, Found of_function, Launched of_launch) {
  loaded = of_module;
  found = of_function;
  launched = of_launch;
}

long stand_in_tensor_maps(void) { return tensor_maps; }

// --- The device and its context ---

CUresult cuDeviceGet(CUdevice* handle, int ordinal) {
  *handle = ordinal;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice handle) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = device.major; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = device.minor; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = device.multiprocessors; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
      *value = device.shared_of_block;
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
      *value = device.shared_of_multiprocessor;
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE:
    case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE:
    case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH:
      *value = 0;  // it has no clocks
      break;
    default: return refuse("cuDeviceGetAttribute: attribute %d is not known", (int)attribute);
  }
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice handle) {
  return cuCtxGetCurrent(context);
}

CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = (CUcontext)&device;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }

CUresult cuCtxGetDevice(CUdevice* handle) { return cuDeviceGet(handle, 0); }

CUresult cuCtxGetLimit(size_t* value, CUlimit limit) {
  *value = 0;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetLimit(CUlimit limit, size_t value) {
  return refuse("cuCtxSetLimit: the stand-in has no printf");
}

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void* data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  if (attribute != CU_POINTER_ATTRIBUTE_DEVICE_POINTER)
    return refuse("cuPointerGetAttribute: attribute %d is not known", (int)attribute);
  *(CUdeviceptr*)data = pointer;
  return CUDA_SUCCESS;
}

// --- Modules and functions ---

typedef struct {
  long number;  // of the process
  int shared;   // bytes of dynamic shared memory that a launch may have
} Function;

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  *module = (CUmodule)loaded((const char*)image);
  return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }

CUresult cuModuleGetFunction(CUfunction* handle, CUmodule module, const char* name) {
  const long number = found((long)module, name);
  if (!number) return refuse("cuModuleGetFunction: no function %s", name);
  Function* function = malloc(sizeof(Function));  // small, and stays for good
  if (!function) return CUDA_ERROR_OUT_OF_MEMORY;
  *function = (Function){number, WITHOUT_ASKING};
  *handle = (CUfunction)function;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction handle) {
  // Nothing is assembled, so that registers and spills are not known.
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction handle, CUfunction_attribute attribute, int value) {
  if (attribute == (CUfunction_attribute)MOST_SHARED_MODE)
    return refuse("cuFuncSetAttribute: the device has no mode for more shared memory");
  if (attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) {
    if (value < 0 || value > device.shared_of_block)
      return refuse("cuFuncSetAttribute: %d bytes of shared memory; a block has %d", value,
                    device.shared_of_block);
    ((Function*)handle)->shared = value;
  }
  return CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(CUfunction handle, CUfunc_cache config) { return CUDA_SUCCESS; }

CUresult cuOccupancyMaxActiveClusters(int* count, CUfunction handle, const CUlaunchConfig* config) {
  return refuse("cuOccupancyMaxActiveClusters: the stand-in has no clusters");
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction handle, void** parameters,
                          void** extra) {
  const Function* function = (const Function*)handle;
  const unsigned grid[3] = {config->gridDimX, config->gridDimY, config->gridDimZ};
  const unsigned block[3] = {config->blockDimX, config->blockDimY, config->blockDimZ};
  for (int i = 0; i < 3; i++)
    if (!grid[i] || grid[i] > (i ? 65535u : 2147483647u) || !block[i])
      return refuse("cuLaunchKernelEx: grid %u x %u x %u, block %u x %u x %u", grid[0], grid[1],
                    grid[2], block[0], block[1], block[2]);
  if ((uint64_t)block[0] * block[1] * block[2] > 1024)
    return refuse("cuLaunchKernelEx: a block of %u x %u x %u threads", block[0], block[1],
                  block[2]);
  if (config->sharedMemBytes > (unsigned)function->shared)
    return refuse("cuLaunchKernelEx: %u bytes of shared memory; the function may have %d",
                  config->sharedMemBytes, function->shared);
  for (unsigned i = 0; i < config->numAttrs; i++)
    // Launches run one after the other, so that one that may overlap the last one does not.
    if (config->attrs[i].id != CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION)
      return refuse("cuLaunchKernelEx: launch attribute %d is not known", (int)config->attrs[i].id);
  if (!launched(function->number, grid, block, config->sharedMemBytes, parameters))
    return refuse("cuLaunchKernelEx: the launch failed");
  return CUDA_SUCCESS;
}

// --- Tensor maps ---

// What the 128 bytes of a map hold here, which the interpreter reads. Dimensions count from the
// innermost, whose stride is one element. The machine reads the same fields.
typedef struct {
  uint64_t address;
  uint64_t element;     // bytes
  uint64_t rank;        // 1 to 3
  uint64_t swizzle;     // 0: none; 1, 2, 3: 32, 64, 128 bytes
  uint64_t sizes[3];    // elements
  uint64_t strides[2];  // bytes, from the second dimension on
  uint64_t box[3];      // elements
  uint64_t unused[4];
} TensorMap;

_Static_assert(sizeof(TensorMap) == sizeof(CUtensorMap), "a tensor map has 128 bytes");

static int bytes_of(CUtensorMapDataType type) {
  switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16: return 2;
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32: return 4;
    default: return 0;
  }
}

static int bytes_of_swizzle(CUtensorMapSwizzle swizzle) {
  switch (swizzle) {
    case CU_TENSOR_MAP_SWIZZLE_NONE: return INT32_MAX;
    case CU_TENSOR_MAP_SWIZZLE_32B: return 32;
    case CU_TENSOR_MAP_SWIZZLE_64B: return 64;
    case CU_TENSOR_MAP_SWIZZLE_128B: return 128;
    default: return 0;
  }
}

// The rules are those of the CUDA driver's manual.
CUresult cuTensorMapEncodeTiled(CUtensorMap* result, CUtensorMapDataType type, cuuint32_t rank,
                                void* address, const cuuint64_t* sizes, const cuuint64_t* strides,
                                const cuuint32_t* box, const cuuint32_t* element_strides,
                                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  const int element = bytes_of(type), width = bytes_of_swizzle(swizzle);
  if (!element || rank < 1 || rank > 3 || !width || interleave != CU_TENSOR_MAP_INTERLEAVE_NONE ||
      fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE)
    return refuse("tensor map: the stand-in has no maps of type %d, rank %u, interleave %d, "
                  "swizzle %d, fill %d",
                  (int)type, rank, (int)interleave, (int)swizzle, (int)fill);
  if ((uintptr_t)result % 64) return refuse("tensor map: the map is not at a multiple of 64 bytes");
  if (!address || (uintptr_t)address % 16)
    return refuse("tensor map: address %p is no multiple of 16 bytes", address);
  TensorMap map = {(uint64_t)(uintptr_t)address, element, rank, 0, {0}, {0}, {0}, {0}};
  map.swizzle = (uint64_t)(swizzle - CU_TENSOR_MAP_SWIZZLE_NONE);
  for (unsigned i = 0; i < rank; i++) {
    if (sizes[i] < 1 || sizes[i] > 1ull << 32)
      return refuse("tensor map: dimension %u has %llu elements; expected 1 to 2^32", i,
                    (unsigned long long)sizes[i]);
    if (box[i] < 1 || box[i] > 256)
      return refuse("tensor map: dimension %u of a box has %u elements; expected 1 to 256", i,
                    box[i]);
    if (element_strides[i] != 1)
      return refuse("tensor map: the stand-in has no maps with steps of %u elements",
                    element_strides[i]);
    map.sizes[i] = sizes[i];
    map.box[i] = box[i];
    if (i + 1 < rank) {
      if (strides[i] % 16 || strides[i] >= 1ull << 40)
        return refuse("tensor map: stride %u is %llu bytes; expected a multiple of 16 below 2^40",
                      i + 1, (unsigned long long)strides[i]);
      map.strides[i] = strides[i];
    }
  }
  const unsigned row = box[0] * element;
  if (row % 16) return refuse("tensor map: rows of a box have %u bytes, no multiple of 16", row);
  if (row > (unsigned)width)
    return refuse("tensor map: rows of a box have %u bytes; the swizzle has %d", row, width);
  memcpy(result, &map, sizeof(map));
  tensor_maps++;
  return CUDA_SUCCESS;
}
