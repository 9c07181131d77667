// A launch with what kernels here ask for: clusters, shared memory, and programmatic dependent launch.
#pragma once

#include <cuda_runtime.h>

namespace sparsert {

struct LaunchShape {
  dim3 blocks;
  int threads;
  int shared_bytes = 0;  // dynamic; the kernel's attribute is the caller's
  int cluster = 1;       // blocks of a cluster along x
};

// dependent_launch: start while the kernel before still runs; the kernel waits for it itself (Hopper and later).
template <typename Arguments>
cudaError_t launch_kernel(void (*kernel)(Arguments), const Arguments& arguments, const LaunchShape& shape,
                          bool dependent_launch, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.blocks;
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attributes[2];
  int count = 0;
  if (shape.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = shape.cluster;
    attributes[count].val.clusterDim.y = 1;
    attributes[count].val.clusterDim.z = 1;
    ++count;
  }
  if (dependent_launch) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count].val.programmaticStreamSerializationAllowed = 1;
    ++count;
  }
  config.attrs = attributes;
  config.numAttrs = count;
  return cudaLaunchKernelEx(&config, kernel, arguments);
}

}  // namespace sparsert
