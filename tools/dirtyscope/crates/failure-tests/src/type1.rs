// SPDX-License-Identifier: GPL-2.0-only

//! Operations on the container.

use crate::sweep::operation;
use harness::{Context, Scenario, Shows, Signature, scenario};

/// A scenario that does these operations, has allocations of the next one fail, and then does another.
macro_rules! fails {
    (
        $name:literal,
        $about:literal,
        [$($setup:literal),* $(,)?],
        $op:literal
        $(, then $then:literal)?
        $(, known $signature:expr $(, or $also:expr)?)?
    ) => {
        Scenario {
            $(signature: Some($signature), $(also: Some($also),)?)?
            ..scenario(concat!("fail-nth/", $name), $about, |context: &Context<'_>| {
                operation(context, concat!($($setup, "\n"),*), $op, concat!($($then)?))
            })
        }
    };
}
pub(crate) use fails;

/// The group of an IOMMU that leaves isn't put back to where it belongs.
const D14: Signature = Signature {
    defect: "D14",
    shows: Shows::Complaint,
    complaints: &["WARNING: drivers/iommu/iommu.c:*"],
};

/// Ranges of IOVA stay that nobody needs.
const D13: Signature = Signature {
    defect: "D13",
    shows: Shows::Difference {
        what: "allocation * fails: MAP 0xfee00000+0x1000 rw: EINVAL, but must be: ok",
        lost: &[],
        spurious: &[],
    },
    complaints: &[],
};

pub const SCENARIOS: &[Scenario] = &[
    fails!("map/new", "MAP, nothing tracked", [], "MAP 0x40000000+0x4000 rw"),
    fails!(
        "map/tracking",
        "MAP while dirty pages are tracked, which takes a bitmap",
        ["MAP 0x80000000+0x1000 rw", "START"],
        "MAP 0x40000000+0x80000 rw"
    ),
    fails!(
        "map/iommu",
        "MAP for an IOMMU: pages are pinned, and get entries in tables that are new",
        ["device 2 JOIN"],
        "MAP 0x40000000+0x8000 rw"
    ),
    fails!(
        "map/iommu-tracking",
        "the same with a bitmap, of memory that the process has touched in part",
        ["device 2 JOIN", "START"],
        "MAP 0x7ffffff000+0x3000 rw"
    ),
    fails!(
        "map/two-iommus",
        "MAP for two groups with an IOMMU, and one whose devices share it",
        ["device 2 JOIN", "device 3 JOIN", "device 4 JOIN"],
        "MAP 0x40000000+0x3000 rw"
    ),
    fails!(
        "map/large-iommu",
        "MAP of memory that takes several tables",
        ["device 2 JOIN"],
        "MAP 0x401ff000+0x202000 rw memory 0x4000"
    ),
    fails!(
        "unmap/one",
        "UNMAP, with pins that the device has to give back",
        ["MAP 0x40000000+0x40000 rw", "START", "device 0 PIN 0x40002000+0x8000"],
        "UNMAP 0x40000000+0x40000"
    ),
    fails!(
        "unmap/iommu",
        "UNMAP of several mappings that an IOMMU has",
        [
            "device 2 JOIN",
            "MAP 0x40000000+0x8000 rw",
            "MAP 0x40040000+0x8000 rw",
            "START",
            "device 0 PIN 0x40002000+0x2000",
        ],
        "UNMAP 0x40000000+0x80000"
    ),
    fails!(
        "unmap/bitmap",
        "UNMAP with bitmap",
        [
            "MAP 0x40000000+0x100000 rw",
            "START",
            "device 0 DMA_WRITE 0x40003000+0x2000 seed 5",
            "device 0 DMA_WRITE 0x40080000+0x1000 seed 6",
        ],
        "UNMAP_BITMAP 0x40000000+0x100000"
    ),
    fails!(
        "unmap/bitmap-iommu",
        "UNMAP with bitmap of what an IOMMU has",
        ["device 2 JOIN", "MAP 0x40000000+0x8000 rw", "START"],
        "UNMAP_BITMAP 0x40000000+0x8000"
    ),
    fails!(
        "start/mappings",
        "START with many mappings, some of them pinned: each gets a bitmap, or none",
        [
            "MAP 0x40000000+0x8000 rw",
            "MAP 0x40100000+0x80000 rw",
            "MAP 0x40200000+0x1000 r-",
            "MAP 0x40300000+0x4000 rw",
            "MAP 0x50000000+0x100000 rw memory 0x1000",
            "device 0 PIN 0x40001000+0x2000",
            "device 0 PIN 0x40300000+0x1000",
        ],
        "START"
    ),
    fails!(
        "start/iommu",
        "START with a group with an IOMMU",
        ["device 2 JOIN", "MAP 0x40000000+0x8000 rw", "MAP 0x40100000+0x8000 rw"],
        "START"
    ),
    fails!(
        "stop",
        "STOP",
        ["MAP 0x40000000+0x8000 rw", "START", "device 0 PIN 0x40001000+0x2000"],
        "STOP"
    ),
    fails!(
        "get-bitmap/one",
        "GET_BITMAP of a mapping with pages that were written once and pages that are pinned",
        [
            "MAP 0x40000000+0x80000 rw",
            "START",
            "device 0 PIN 0x40001000+0x2000",
            "device 0 DMA_WRITE 0x40043000+0x3000 seed 5",
        ],
        "GET_BITMAP 0x40000000+0x80000"
    ),
    fails!(
        "get-bitmap/scope",
        "GET_BITMAP while every page of a mapping is dirty",
        ["device 2 JOIN", "MAP 0x40000000+0x80000 rw memory 0x80000", "START"],
        "GET_BITMAP 0x40000000+0x80000"
    ),
    fails!(
        "join/emulated",
        "another mediated device joins",
        ["MAP 0x40000000+0x8000 rw", "START", "device 1 LEAVE"],
        "device 1 JOIN"
    ),
    fails!(
        "join/iommu",
        "the first group with an IOMMU joins a container without mappings",
        [],
        "device 2 JOIN"
    ),
    fails!(
        "join/iommu-replay",
        "the first group with an IOMMU joins: all mappings are pinned and mapped",
        [
            "MAP 0x40000000+0x4000 rw",
            "MAP 0x80000000+0x2000 rw",
            "device 0 PIN 0x40001000+0x2000",
            "START",
            "device 0 DMA_WRITE 0x80000000+0x1000 seed 3",
            "GET_BITMAP 0x80000000+0x2000",
        ],
        "device 2 JOIN"
    ),
    fails!(
        "join/second-iommu",
        "another group with an IOMMU joins: it has what the first one has",
        ["device 2 JOIN", "MAP 0x40000000+0x4000 rw", "START"],
        "device 3 JOIN"
    ),
    fails!(
        "join/shared",
        "a group of two devices joins",
        ["MAP 0x40000000+0x4000 rw"],
        "device 4 JOIN"
    ),
    fails!(
        "leave/emulated",
        "a mediated device leaves",
        ["MAP 0x40000000+0x8000 rw", "START", "device 0 PIN 0x40001000+0x2000"],
        "device 1 LEAVE"
    ),
    fails!(
        "leave/iommu",
        "the only group with an IOMMU leaves: pages of devices stay pinned",
        ["device 2 JOIN", "MAP 0x40000000+0x4000 rw", "device 0 PIN 0x40001000+0x2000", "START"],
        "device 2 LEAVE",
        known D14
    ),
    fails!(
        "leave/ranges",
        "with the only IOMMU go the ranges of IOVA that it can't map",
        ["device 2 JOIN"],
        "device 2 LEAVE",
        then "MAP 0xfee00000+0x1000 rw",
        known D13, or D14
    ),
    fails!(
        "leave/iommu-close",
        "it leaves as its file is closed",
        ["device 2 JOIN", "MAP 0x40000000+0x4000 rw", "START"],
        "device 2 LEAVE close",
        known D14
    ),
    fails!(
        "leave/first-iommu",
        "one of two groups with an IOMMU leaves",
        ["device 2 JOIN", "device 3 JOIN", "MAP 0x40000000+0x4000 rw", "START"],
        "device 2 LEAVE",
        known D14
    ),
    fails!(
        "vaddr/invalidate",
        "a mapping loses its address",
        [
            "device 2 JOIN",
            "device 0 CLOSE",
            "device 0 LEAVE",
            "device 1 LEAVE",
            "MAP 0x40000000+0x4000 rw"
        ],
        "UNMAP 0x40000000+0x4000 flags 0x4"
    ),
    fails!(
        "vaddr/update",
        "a mapping gets its address again",
        [
            "device 2 JOIN",
            "device 0 CLOSE",
            "device 0 LEAVE",
            "device 1 LEAVE",
            "MAP 0x40000000+0x4000 rw",
            "UNMAP 0x40000000+0x4000 flags 0x4",
        ],
        "MAP 0x40000000+0x4000 -- flags 0x4"
    ),
];
