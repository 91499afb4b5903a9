/* SPDX-License-Identifier: GPL-2.0 */
/* Input of bindgen: C interfaces that the kernel crate has no bindings for. */

#include <linux/anon_inodes.h>
#include <linux/interval_tree.h>
#include <linux/iommu.h>
#include <linux/iova_bitmap.h>
#include <linux/kcov.h>
#include <linux/mdev.h>
#include <linux/vfio.h>
#include <linux/rust_mdev_dma.h>
#include <linux/rust_vfio_edu.h>
