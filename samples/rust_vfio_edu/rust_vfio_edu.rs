// SPDX-License-Identifier: GPL-2.0

//! Rust VFIO driver of QEMU's `edu` device: DMA on command by a device that has an IOMMU.
//!
//! It is what `rust_mdev_dma` is, with the same registers and commands, but its memory accesses are
//! real DMA by the device's engine. And it pins pages, which no driver of such a device may do, to
//! test what type1 makes of it. How it differs is in `include/uapi/linux/rust_vfio_edu.h`.
//!
//! This is a PCI driver of its own, no variant of vfio-pci: `vfio_pci_core` would bring its own
//! `vfio_device_ops`, so the abstractions of this repository would be tested by one driver less.
//!
//! Kernel modules written in Rust can't import anything from each other. So this compiles the
//! abstractions, the bindings and the register interface of `rust_mdev_dma` once more, by `#[path]`.

// As in `rust_mdev_dma`.
#![warn(clippy::arithmetic_side_effects, clippy::indexing_slicing)]

use abstractions::{
    pci::{enable_device_mem, vfio_override, Adapter},
    vfio,
};
use device::{EduData, EduDevice};
use kernel::{device::Core, pci, prelude::*};

#[path = "../rust_mdev_dma/abstractions/mod.rs"]
mod abstractions;
#[path = "../rust_mdev_dma/bindings/mod.rs"]
mod bindings;
mod device;
mod edu;
mod pins;

/// Name of the module and the driver.
const NAME: &CStr = c"rust_vfio_edu";

struct EduDriver;

kernel::pci_device_table!(
    PCI_TABLE,
    <EduDriver as pci::Driver>::IdInfo,
    [(vfio_override(edu::VENDOR_ID, edu::DEVICE_ID), ())]
);

impl pci::Driver for EduDriver {
    type IdInfo = ();
    type Data<'bound> = ();

    const ID_TABLE: pci::IdTable<Self::IdInfo> = &PCI_TABLE;

    fn probe<'bound>(
        pdev: &'bound pci::Device<Core<'_>>,
        _info: Option<&'bound Self::IdInfo>,
    ) -> impl PinInit<Self::Data<'bound>, Error> + 'bound {
        enable_device_mem(pdev)?;
        let data = EduData::new(pdev)?;
        vfio::Registration::<EduDevice>::new_foreign_owned(pdev.as_ref(), data)
    }
}

kernel::module_driver!(<T>, Adapter<T>, {
    type: EduDriver,
    name: "rust_vfio_edu",
    authors: ["rust-mdev-dma developers"],
    description: "Rust VFIO driver of QEMU's edu device, to test VFIO with",
    license: "GPL",
    // For `iova_bitmap_set()`.
    imports_ns: ["IOMMUFD"],
    params: {
        max_pins: u64 {
            default: 65536,
            description: "Maximum number of pins of a device, which also bounds the memory it uses",
        },
        max_length: u64 {
            default: 1048576,
            description: "Maximum size of a command's range in bytes; 4096 take 200 ms, and an unmap waits",
        },
        address_bits: u32 {
            default: 28,
            description: "Number of address bits of the device's DMA, as by QEMU's -device edu,dma_mask=",
        },
    },
});
