# find_package(Vmcore) gives the targets Vmcore::vmcore, the shared library, and Vmcore::static.
get_filename_component(_vmcore_prefix "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)

if(NOT TARGET Vmcore::vmcore)
  find_package(Threads REQUIRED)
  add_library(Vmcore::vmcore SHARED IMPORTED)
  set_target_properties(Vmcore::vmcore PROPERTIES
    IMPORTED_LOCATION "${_vmcore_prefix}/lib/libvmcore.so.0"
    IMPORTED_SONAME "libvmcore.so.0"
    INTERFACE_INCLUDE_DIRECTORIES "${_vmcore_prefix}/include")
  add_library(Vmcore::static STATIC IMPORTED)
  set_target_properties(Vmcore::static PROPERTIES
    IMPORTED_LOCATION "${_vmcore_prefix}/lib/libvmcore.a"
    INTERFACE_INCLUDE_DIRECTORIES "${_vmcore_prefix}/include"
    INTERFACE_LINK_LIBRARIES "Threads::Threads;gcc_s;util;rt;m;dl")
endif()
unset(_vmcore_prefix)
