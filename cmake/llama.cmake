# The only file that knows how llama.cpp is built. It provides the targets `llama` and `ggml` (static, patched)
# and MOESHARD_LLAMA_TREE, the tree they come from.

set(MOESHARD_LLAMA_DIR  ${CMAKE_CURRENT_LIST_DIR}/../third_party/llama.cpp)
set(MOESHARD_LLAMA_TREE ${MOESHARD_LLAMA_DIR}/tree)
file(GLOB _patches CONFIGURE_DEPENDS ${MOESHARD_LLAMA_DIR}/patches/*.patch)
# As the library says what it was built from.
file(STRINGS ${MOESHARD_LLAMA_DIR}/pin.txt MOESHARD_LLAMA_PIN REGEX "^[^#]")
string(REGEX MATCH "^[^ =]+==[^ ]+" MOESHARD_LLAMA_PIN "${MOESHARD_LLAMA_PIN}")
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS
    ${MOESHARD_LLAMA_DIR}/pin.txt ${MOESHARD_LLAMA_DIR}/prepare.py ${_patches})

# Run prepare.py; its message is what the user should read.
function(moeshard_prepare_llama)
    execute_process(
        COMMAND ${Python_EXECUTABLE} ${MOESHARD_LLAMA_DIR}/prepare.py ${ARGN}
        RESULT_VARIABLE failed)
    if(failed)
        message(FATAL_ERROR "third_party/llama.cpp could not be prepared (see the lines above)")
    endif()
endfunction()
moeshard_prepare_llama()
if(SKBUILD_STATE STREQUAL "sdist")
    return()
endif()

set(BUILD_SHARED_LIBS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(GGML_RPC ON CACHE BOOL "layers on other machines, through llama.cpp's RPC backend")
# Found by itself where it is built, it would be missed where the wheel is installed.
set(GGML_RPC_RDMA OFF CACHE BOOL "")
# llama.cpp's own thread pool: no libgomp to find at run time or to share with other libraries of the process.
set(GGML_OPENMP OFF CACHE BOOL "")
if(APPLE)
    set(GGML_METAL ON CACHE BOOL "")
    set(GGML_METAL_EMBED_LIBRARY ON CACHE BOOL "")
endif()
set(LLAMA_BUILD_COMMON OFF CACHE BOOL "")
set(LLAMA_ALL_WARNINGS OFF CACHE BOOL "")
set(GGML_CCACHE OFF CACHE BOOL "")  # the top-level file sets the launcher for everything
# Without these it asks git, and every commit of ours would rebuild ggml.
set(LLAMA_BUILD_NUMBER 0)
set(LLAMA_BUILD_COMMIT pinned)

add_subdirectory(${MOESHARD_LLAMA_TREE} ${CMAKE_BINARY_DIR}/llama.cpp EXCLUDE_FROM_ALL SYSTEM)

# The patches call into csrc/engine.
foreach(target llama ggml-rpc)
    target_include_directories(${target} PRIVATE ${CMAKE_CURRENT_LIST_DIR}/../csrc/engine)
endforeach()
# GGML_ABORT is turned into an exception on the calling thread; the C frames in between must be unwindable.
foreach(target ggml-base ggml-cpu)
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:C>:-fexceptions>)
endforeach()
