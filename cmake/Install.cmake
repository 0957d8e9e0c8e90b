# SPDX-License-Identifier: Apache-2.0
# Install rules: headers, one CMake package with components, and a pkg-config file.
include(CMakePackageConfigHelpers)

# Nothing installed depends on the architecture, so all of it goes below share/.
set(package_dir "${CMAKE_INSTALL_DATADIR}/cmake/magicpig")

function(magicpig_install_target target export_name)
  install(TARGETS ${target} EXPORT ${export_name}
    FILE_SET HEADERS DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}" COMPONENT magicpig_dev)
  install(EXPORT ${export_name} NAMESPACE magicpig:: DESTINATION "${package_dir}"
    COMPONENT magicpig_dev)
endfunction()

magicpig_install_target(magicpig magicpigTargets)
foreach(component IN LISTS MAGICPIG_COMPONENTS)
  magicpig_install_target(magicpig_${component} magicpig-${component}Targets)
endforeach()
if(highway IN_LIST MAGICPIG_COMPONENTS)
  install(FILES "${PROJECT_SOURCE_DIR}/cmake/HighwayHeaders.cmake" DESTINATION "${package_dir}"
    COMPONENT magicpig_dev)
endif()
if(xsimd IN_LIST MAGICPIG_COMPONENTS)
  install(FILES "${PROJECT_SOURCE_DIR}/cmake/XsimdHeaders.cmake" DESTINATION "${package_dir}"
    COMPONENT magicpig_dev)
endif()

configure_package_config_file("${PROJECT_SOURCE_DIR}/cmake/magicpigConfig.cmake.in"
  "${PROJECT_BINARY_DIR}/magicpigConfig.cmake" INSTALL_DESTINATION "${package_dir}"
  NO_SET_AND_CHECK_MACRO)
# Before 1.0 a minor release may break its users.
write_basic_package_version_file("${PROJECT_BINARY_DIR}/magicpigConfigVersion.cmake"
  COMPATIBILITY SameMinorVersion ARCH_INDEPENDENT)
configure_file("${PROJECT_SOURCE_DIR}/cmake/magicpig.pc.in" "${PROJECT_BINARY_DIR}/magicpig.pc" @ONLY)

install(FILES
  "${PROJECT_BINARY_DIR}/magicpigConfig.cmake" "${PROJECT_BINARY_DIR}/magicpigConfigVersion.cmake"
  DESTINATION "${package_dir}" COMPONENT magicpig_dev)
install(FILES "${PROJECT_BINARY_DIR}/magicpig.pc"
  DESTINATION "${CMAKE_INSTALL_DATADIR}/pkgconfig" COMPONENT magicpig_dev)
install(FILES "${PROJECT_SOURCE_DIR}/LICENSE" DESTINATION "${CMAKE_INSTALL_DOCDIR}"
  COMPONENT magicpig_dev)
