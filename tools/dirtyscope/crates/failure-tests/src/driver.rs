// SPDX-License-Identifier: GPL-2.0-only

//! Operations of devices: pins, and `vfio_dma_rw()`, in the caller's context and in a worker's.

use crate::sweep::operation;
use crate::type1::fails;
use harness::{Context, Scenario, scenario};

pub const SCENARIOS: &[Scenario] = &[
    fails!("open/mediated", "a mediated device is opened", [], "device 1 OPEN"),
    fails!(
        "close",
        "a device with pins is closed",
        ["MAP 0x40000000+0x8000 rw", "START", "device 0 PIN 0x40001000+0x2000"],
        "device 0 CLOSE"
    ),
    fails!(
        "reset",
        "a device with pins is reset",
        ["MAP 0x40000000+0x8000 rw", "START", "device 0 PIN 0x40001000+0x2000"],
        "device 0 RESET"
    ),
    fails!(
        "pin/new",
        "PIN of memory that the process hasn't touched",
        ["MAP 0x40000000+0x40000 rw"],
        "device 0 PIN 0x40003000+0x4000"
    ),
    fails!(
        "pin/one-tracking",
        "PIN of a page while dirty pages are tracked",
        ["MAP 0x40000000+0x40000 rw", "START"],
        "device 0 PIN 0x40003000+0x1000"
    ),
    fails!(
        "pin/again",
        "PIN of pages of which some are pinned already",
        [
            "MAP 0x40000000+0x40000 rw",
            "device 0 PIN 0x40004000+0x2000",
            "device 1 OPEN",
            "device 1 PIN 0x40003000+0x2000",
        ],
        "device 0 PIN 0x40003000+0x4000"
    ),
    fails!(
        "pin/mappings",
        "PIN of pages of two mappings",
        ["MAP 0x40000000+0x4000 rw", "MAP 0x40004000+0x4000 rw"],
        "device 0 PIN 0x40002000+0x4000"
    ),
    fails!(
        "pin/batches",
        "PIN in three calls of vfio_pin_pages()",
        ["MAP 0x40000000+0x100000 rw"],
        "device 0 PIN 0x4003f000+0x42000"
    ),
    fails!(
        "pin/iommu",
        "PIN of memory that an IOMMU has",
        ["device 2 JOIN", "MAP 0x40000000+0x8000 rw"],
        "device 0 PIN 0x40002000+0x3000"
    ),
    fails!(
        "pin/promotes",
        "PIN by a device with an IOMMU, which promotes its group",
        ["device 6 JOIN", "device 6 OPEN", "MAP 0x40000000+0x8000 rw", "START"],
        "device 6 PIN 0x40002000+0x1000"
    ),
    fails!(
        "pin/background",
        "PIN by a worker",
        ["MAP 0x40000000+0x40000 rw"],
        "device 0 background PIN 0x40003000+0x4000"
    ),
    fails!(
        "pin/background-tracking",
        "PIN of a page by a worker while dirty pages are tracked",
        ["MAP 0x40000000+0x40000 rw", "START"],
        "device 0 background PIN 0x40003000+0x1000"
    ),
    fails!(
        "raw-pin",
        "RAW_PIN of pages",
        ["MAP 0x40000000+0x40000 rw"],
        "device 0 RAW_PIN 0x40003000+0x3000 prot 3"
    ),
    fails!(
        "raw-unpin",
        "RAW_UNPIN of them",
        ["MAP 0x40000000+0x40000 rw", "START", "device 0 RAW_PIN 0x40003000+0x3000 prot 3"],
        "device 0 RAW_UNPIN 0x40003000+0x3000 prot 3"
    ),
    fails!(
        "unpin/pages",
        "UNPIN",
        ["MAP 0x40000000+0x40000 rw", "START", "device 0 PIN 0x40003000+0x4000"],
        "device 0 UNPIN 0x40004000+0x2000"
    ),
    fails!(
        "unpin/background",
        "UNPIN by a worker",
        ["MAP 0x40000000+0x40000 rw", "START", "device 0 PIN 0x40003000+0x4000"],
        "device 0 background UNPIN 0x40004000+0x2000"
    ),
    fails!(
        "write/pages",
        "WRITE through pins",
        ["MAP 0x40000000+0x40000 rw", "START", "device 0 PIN 0x40003000+0x4000"],
        "device 0 WRITE 0x40003800+0x2000 seed 7"
    ),
    fails!(
        "read/pages",
        "READ through pins",
        ["MAP 0x40000000+0x40000 rw", "START", "device 0 PIN 0x40003000+0x4000"],
        "device 0 READ 0x40003800+0x2000"
    ),
    fails!(
        "dma-write/untouched",
        "vfio_dma_rw() writes memory that the process hasn't touched",
        ["MAP 0x40000000+0x40000 rw", "START"],
        "device 0 DMA_WRITE 0x40003000+0x800 seed 7"
    ),
    fails!(
        "dma-write/touched",
        "vfio_dma_rw() writes memory that is there",
        ["MAP 0x40000000+0x40000 rw", "process WRITE 0x40003000+0x4000 seed 1", "START"],
        "device 0 DMA_WRITE 0x40003000+0x3000 seed 7"
    ),
    fails!(
        "dma-write/background",
        "a worker's vfio_dma_rw() writes memory that the process hasn't touched",
        ["MAP 0x40000000+0x40000 rw", "START"],
        "device 0 background DMA_WRITE 0x40003000+0x800 seed 7"
    ),
    fails!(
        "dma-read/untouched",
        "vfio_dma_rw() reads memory that the process hasn't touched",
        ["MAP 0x40000000+0x40000 rw", "START"],
        "device 0 DMA_READ 0x40003000+0x1800"
    ),
    fails!(
        "dma-read/background",
        "a worker's vfio_dma_rw() does",
        ["MAP 0x40000000+0x40000 rw", "START"],
        "device 0 background DMA_READ 0x40003000+0x1800"
    ),
];
