// SPDX-License-Identifier: GPL-2.0-only

use crate::{PAGE, at};
use anyhow::{Result, anyhow, ensure};
use mdev_dma::MdevDma;
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::Duration,
};
use vfio_client::{
    Container, DeviceNode, MapArgs, Memory,
    uapi::{VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE},
};

/// A thread that does something again and again until it is stopped, or this is dropped.
pub struct Repeated {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Repeated {
    pub fn new(mut f: impl FnMut() -> Result<()> + Send + 'static) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stops = stop.clone();
        let thread = thread::spawn(move || {
            while !stops.load(Relaxed) {
                f()?;
            }
            Ok(())
        });
        Self { stop, thread: Some(thread) }
    }

    /// Stops it, and says what came of it.
    pub fn stop(mut self) -> Result<()> {
        self.stop.store(true, Relaxed);
        let Some(thread) = self.thread.take() else { return Ok(()) };
        thread.join().map_err(|_| anyhow!("a thread panicked"))?
    }
}

/// Doesn't wait for the thread, which may hang in the kernel.
impl Drop for Repeated {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
    }
}

/// Has a device pin and unpin memory of its own, at page 2²⁰, again and again. It has its pins locked
/// meanwhile, so an unmap that tells it to unpin waits for some ms, with `iommu->lock` dropped.
///
/// Devices are told in the order in which they were opened, the last one first.
pub fn busy(container: &Arc<Container>, node: &DeviceNode) -> Result<Repeated> {
    const SIZE: u64 = 4096 * PAGE;
    let (iova, flags) = (at(1 << 20, 0), VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE);
    let memory = &Arc::new(Memory::new(SIZE as usize)?);
    container.map(&MapArgs { memory, offset: 0, iova, size: SIZE, flags, argsz: None })?;
    let device = MdevDma::open(container, node)?;
    let repeated = Repeated::new(move || {
        ensure!(device.pin(iova, SIZE)?.status == 0, "pages can't be pinned");
        ensure!(device.unpin(iova, SIZE)?.status == 0, "pages can't be unpinned");
        Ok(())
    });
    // The first pin faults its memory in.
    thread::sleep(Duration::from_millis(50));
    Ok(repeated)
}
