# Read by CMake right after project() (CMAKE_PROJECT_INCLUDE): from then on this folder is the CUDA toolkit, and a project's
# own CMake files build with it as they are.
set(cuda_on_cpu ${CMAKE_CURRENT_LIST_DIR})
set(CMAKE_CXX_COMPILER_LAUNCHER ${Python3_EXECUTABLE} ${cuda_on_cpu}/nvcc.py)

macro(enable_language language)
  if(NOT ${language} STREQUAL CUDA)
    _enable_language(${language} ${ARGN})
  endif()
endmacro()

macro(find_package name)
  if(NOT ${name} STREQUAL CUDAToolkit)
    _find_package(${name} ${ARGN})
  else()
    set(CUDAToolkit_VERSION 13.0)
    set(CUDAToolkit_VERSION_MAJOR 13)
    set(CUDAToolkit_INCLUDE_DIRS ${cuda_on_cpu}/include)
    set(CUDAToolkit_LIBRARY_DIR ${cuda_on_cpu}/lib)  # which there is not
    set(cublas_library cuda_on_cpu)  # where a project looks for these libraries: they are all one
    set(curand_library cuda_on_cpu)
    set(cudnn_library cuda_on_cpu)
    add_library(cuda_on_cpu STATIC ${cuda_on_cpu}/runtime.cpp ${cuda_on_cpu}/streams.cpp ${cuda_on_cpu}/libraries.cpp ${cuda_on_cpu}/cudnn.cpp)
    target_compile_features(cuda_on_cpu PUBLIC cxx_std_17)
    target_compile_options(cuda_on_cpu PRIVATE -O2 -Wall)
    target_include_directories(cuda_on_cpu PUBLIC ${cuda_on_cpu}/include PRIVATE ${blas_include})
    target_link_libraries(cuda_on_cpu PUBLIC ${openblas} ${CMAKE_DL_LIBS})
    set_target_properties(cuda_on_cpu PROPERTIES POSITION_INDEPENDENT_CODE ON)
    add_library(CUDA::cudart_static ALIAS cuda_on_cpu)

    add_library(cuda_driver SHARED ${cuda_on_cpu}/driver.cpp)  # libcuda.so.1
    target_compile_features(cuda_driver PRIVATE cxx_std_17)
    target_compile_options(cuda_driver PRIVATE -O2 -Wall)
    target_include_directories(cuda_driver PRIVATE ${cuda_on_cpu}/include)
    set_target_properties(cuda_driver PROPERTIES OUTPUT_NAME cuda SOVERSION 1)
    install(TARGETS cuda_driver LIBRARY DESTINATION driver NAMELINK_SKIP)
    cmake_language(DEFER DIRECTORY ${CMAKE_SOURCE_DIR} CALL compile_cu_files)
  endif()
endmacro()

function(compile_cu_files)
  get_target_property(sources caffe SOURCES)
  list(FILTER sources INCLUDE REGEX "\\.cu$")
  set_source_files_properties(${sources} PROPERTIES LANGUAGE CXX)
endfunction()
