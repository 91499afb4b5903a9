// SPDX-License-Identifier: GPL-2.0-only

//! Who is charged for what a container takes of the kernel's memory.

use anyhow::{Context as _, Result, anyhow};
use harness::{Context, Failure, Scenario, Shows, Signature, Skip, defect};
use std::{
    fs,
    path::{Path, PathBuf},
};
use testbed::{Op, PAGE, Testbed};
use vfio_client::uapi::{VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE};

pub const SCENARIOS: &[Scenario] = &[defect(
    "type1/defect/D16-not-charged",
    "the bitmaps that START allocates are charged to the cgroup of who starts",
    not_charged,
    Signature {
        defect: "D16",
        shows: Shows::Difference {
            what: "START allocates a bitmap of 8192 KiB, and its cgroup is charged less than 1024 KiB",
            lost: &[],
            spurious: &[],
        },
        complaints: &[],
    },
)];

/// A cgroup that this process is in until it is dropped.
struct Cgroup(PathBuf);

impl Cgroup {
    const ROOT: &str = "/sys/fs/cgroup";

    /// Skips the scenario if there is no place for one.
    fn new() -> Result<Self> {
        let root = Path::new(Self::ROOT);
        let skip = |_| anyhow!(Skip(format!("needs cgroup2 with memory at {}", Self::ROOT)));
        fs::write(root.join("cgroup.subtree_control"), "+memory").map_err(skip)?;
        let this = Self(root.join(format!("dirtyscope-{}", std::process::id())));
        fs::create_dir(&this.0).with_context(|| this.0.display().to_string())?;
        this.enter(&this.0)?;
        Ok(this)
    }

    fn enter(&self, group: &Path) -> Result<()> {
        let path = group.join("cgroup.procs");
        fs::write(&path, std::process::id().to_string()).with_context(|| path.display().to_string())
    }

    /// Bytes that are charged to it.
    fn charged(&self) -> Result<u64> {
        Ok(fs::read_to_string(self.0.join("memory.current"))?.trim().parse()?)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let left = self.enter(Path::new(Self::ROOT)).and_then(|()| Ok(fs::remove_dir(&self.0)?));
        if let Err(error) = left {
            eprintln!("dirtyscope: {} stays: {error:#}", self.0.display());
        }
    }
}

fn not_charged(context: &Context<'_>) -> Result<()> {
    const LARGE: u64 = 256 << 30;
    const BITMAP: u64 = LARGE / PAGE / 8;
    const FEW: u64 = BITMAP / 8;
    let mut bed = Testbed::new(context)?;
    let flags = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE;
    bed.must(Op::Map { iova: 1 << 40, size: LARGE, backed: PAGE, flags })?;
    let cgroup = Cgroup::new()?;
    let before = cgroup.charged()?;
    bed.start()?;
    let charged = cgroup.charged()?.saturating_sub(before);
    context.note(format_args!("{charged} bytes are charged"));
    let wrong = match charged {
        BITMAP.. => None,
        0..FEW => Some(format!(
            "START allocates a bitmap of {} KiB, and its cgroup is charged less than {} KiB",
            BITMAP >> 10,
            FEW >> 10
        )),
        _ => Some(format!("START allocates {BITMAP} bytes, {charged} are charged")),
    };
    Failure::unless_none(wrong)
}
