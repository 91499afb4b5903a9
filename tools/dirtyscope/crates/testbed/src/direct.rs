// SPDX-License-Identifier: GPL-2.0-only

//! A device by iommufd, without group and container.

use crate::{PAGE, at, fixture::has_iommufd, same, status};
use anyhow::{Result, ensure};
use dirty_model::Errno;
use harness::{Context, Skip};
use mdev_dma::{MdevDma, pattern};
use std::{ops::Range, sync::Arc};
use vfio_client::{Ioas, Memory};

/// The device in an address space with so many pages of memory, from page 0 on.
pub struct Direct {
    // Closed in this order.
    pub device: MdevDma,
    pub ioas: Arc<Ioas>,
    pub memory: Arc<Memory>,
}

impl Direct {
    /// Skips the scenario if the kernel has no iommufd.
    pub fn new(context: &Context<'_>, pages: u64) -> Result<Self> {
        let ioas = has_iommufd(status(Ioas::new())?)?;
        let device = match MdevDma::open_in(&ioas, &context.device(0)?) {
            Err(error) if Errno(error.errno()) == Errno::ENOENT => {
                return Err(Skip("this kernel has no /dev/vfio/devices".into()).into());
            }
            device => device?,
        };
        let memory = Arc::new(Memory::new((pages * PAGE) as usize)?);
        ioas.map(&memory, at(0, 0))?;
        Ok(Self { device, ioas, memory })
    }

    /// Unmaps all of it.
    pub fn unmap(&self) -> Result<()> {
        let size = self.memory.len() as u64;
        same("bytes unmapped", size, self.ioas.unmap(at(0, 0), size)?)
    }

    /// Fails unless bytes have the pattern of a seed.
    pub fn has(&self, bytes: Range<u64>, seed: u64) -> Result<()> {
        let mut found = vec![0; (bytes.end - bytes.start) as usize];
        let mut expected = found.clone();
        self.memory.read((bytes.start - at(0, 0)) as usize, &mut found);
        pattern::fill(&mut expected, seed, bytes.start);
        ensure!(found == expected, "{bytes:x?} haven't the pattern of {seed}");
        Ok(())
    }
}
