# Included by CMakeLists.txt if PYCAFFE_CUDA=1: Caffe's kernels, cuBLAS and cuRAND, and convolutions by cuDNN (8 or 9) if it
# is found. Caffe's own cuDNN code needs version 7 and is left out.
set(PYCAFFE_CUDA_ARCH "$ENV{PYCAFFE_CUDA_ARCH}" CACHE STRING "CUDA architectures, as CMake names them")
if(NOT PYCAFFE_CUDA_ARCH)
  # This machine's GPUs if it has any; otherwise every architecture that this nvcc supports.
  execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
                  RESULT_VARIABLE no_gpu OUTPUT_QUIET ERROR_QUIET)
  if(no_gpu)
    set(PYCAFFE_CUDA_ARCH all)
  else()
    set(PYCAFFE_CUDA_ARCH native)
  endif()
endif()
set(CMAKE_CUDA_ARCHITECTURES ${PYCAFFE_CUDA_ARCH})
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
message(STATUS "CUDA ${CUDAToolkit_VERSION} for ${CMAKE_CUDA_ARCHITECTURES}")

# Libraries: the toolkit's own, or else those of the Python packages nvidia-cublas, nvidia-curand and nvidia-cudnn-cu13, which
# are loaded from site-packages at run time (pip install './pycaffe[cuda]').
set(major ${CUDAToolkit_VERSION_MAJOR})
foreach(package cublas cudnn-cu${major})
  python_says(${package}_root "import importlib.metadata as m
try: print(m.distribution('nvidia-${package}').locate_file('nvidia'))
except m.PackageNotFoundError: pass")
endforeach()
foreach(name cublas curand)
  find_library(${name}_library NAMES ${name} lib${name}.so.${major} lib${name}.so.10
               PATHS ${CUDAToolkit_LIBRARY_DIR} ${cublas_root}/cu${major}/lib NO_DEFAULT_PATH)
  find_path(${name}_include NAMES ${name}.h
            PATHS ${CUDAToolkit_INCLUDE_DIRS} ${cublas_root}/cu${major}/include NO_DEFAULT_PATH)
endforeach()
if(PYCAFFE_CUDNN)
  set(cudnn_root ${cudnn-cu${major}_root}/cudnn)
  find_path(cudnn_include NAMES cudnn_version.h HINTS ${cudnn_root}/include ${CUDAToolkit_INCLUDE_DIRS})  # from 8 on
  find_library(cudnn_library NAMES libcudnn.so.9 cudnn libcudnn.so.8 NAMES_PER_DIR
               HINTS ${cudnn_root}/lib ${CUDAToolkit_LIBRARY_DIR})
endif()
foreach(name cublas curand)
  if(NOT ${name}_library OR NOT ${name}_include)
    message(FATAL_ERROR "${name} is neither in ${CUDAToolkit_LIBRARY_DIR} nor installed as a package; for CUDA 13: "
                        "PYCAFFE_CUDA=1 pip install './pycaffe[cuda]'")
  endif()
endforeach()
set(cuda_rpath "${CUDAToolkit_LIBRARY_DIR};$ORIGIN/../nvidia/cu${major}/lib;$ORIGIN/../nvidia/cudnn/lib")

file(GLOB kernels CONFIGURE_DEPENDS ${source}/layers/*.cu ${source}/solvers/*.cu ${source}/util/*.cu src/*.cu)
file(GLOB patched_kernels ${patched}/*.cu)
foreach(file ${patched_kernels})
  cmake_path(GET file FILENAME name)
  list(FILTER kernels EXCLUDE REGEX "/${name}$")
endforeach()
target_sources(caffe PRIVATE ${kernels} ${patched_kernels} src/gpu.cpp)
target_compile_options(caffe PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-w --default-stream per-thread>)
set_source_files_properties(src/canvas.cu PROPERTIES COMPILE_OPTIONS -fmad=false)  # rounds as the step on the CPU does
target_compile_definitions(caffe_headers INTERFACE $<$<COMPILE_LANGUAGE:CXX>:CUDA_API_PER_THREAD_DEFAULT_STREAM=1>)
set_target_properties(caffe PROPERTIES CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON CUDA_ARCHITECTURES "${PYCAFFE_CUDA_ARCH}")
target_include_directories(caffe_headers SYSTEM INTERFACE ${CUDAToolkit_INCLUDE_DIRS} ${cublas_include} ${curand_include})
target_link_libraries(caffe_headers INTERFACE CUDA::cudart_static ${cublas_library} ${curand_library})

if(cudnn_library AND cudnn_include)
  message(STATUS "cuDNN: ${cudnn_library}")
  target_sources(caffe PRIVATE src/cudnn_convolution.cpp)
  target_include_directories(caffe SYSTEM PRIVATE ${cudnn_include})
  target_link_libraries(caffe PRIVATE ${cudnn_library})
else()
  message(STATUS "cuDNN: not found; convolutions are Caffe's own")
endif()

# CUDA 13 removed three fields of cudaDeviceProp that Caffe only prints, so common.cpp is built without those lines.
if(CUDAToolkit_VERSION_MAJOR GREATER_EQUAL 13)
  file(READ ${patched}/common.cpp common)
  string(REGEX REPLACE "  LOG\\(INFO\\) << \"[A-Za-z ]+: *\"[ \n]*<< [(]?prop\\.(clockRate|deviceOverlap|kernelExecTimeoutEnabled)[^;]*;\n"
         "" common "${common}")
  file(WRITE ${patched}/common.cpp "${common}")
endif()
