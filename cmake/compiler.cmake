# Compiler settings shared by the engine and our own code.

# Before the languages are enabled: llama.cpp and pip have each their own idea of a default.
if(NOT CMAKE_BUILD_TYPE)
    set(CMAKE_BUILD_TYPE Release)
endif()
enable_language(C)
enable_language(CXX)

set(CMAKE_CXX_STANDARD 17)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)

# Messages and debug information name files from the root of the project, wherever it was built. The same options in
# every clone also let clones share compiled objects.
include(CheckCXXCompilerFlag)
check_cxx_compiler_flag(-ffile-prefix-map=a=b MOESHARD_FILE_PREFIX_MAP)
if(MOESHARD_FILE_PREFIX_MAP)
    add_compile_options(-ffile-prefix-map=${CMAKE_SOURCE_DIR}/=)
endif()

if(MOESHARD_CCACHE AND NOT EXISTS ${MOESHARD_CCACHE})
    unset(MOESHARD_CCACHE CACHE)  # found in an environment that is gone
endif()
find_program(MOESHARD_CCACHE ccache)
if(MOESHARD_CCACHE)
    # `env` and not `cmake -E env`: pip may bring another cmake each time, and a command that changed is run again.
    set(launcher env CCACHE_BASEDIR=${CMAKE_SOURCE_DIR} CCACHE_NOHASHDIR=1 ${MOESHARD_CCACHE})
    set(CMAKE_C_COMPILER_LAUNCHER ${launcher})
    set(CMAKE_CXX_COMPILER_LAUNCHER ${launcher})
endif()
