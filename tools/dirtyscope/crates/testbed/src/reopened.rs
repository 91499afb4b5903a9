// SPDX-License-Identifier: GPL-2.0-only

//! A group that can be opened although its device is open.

use crate::{PAGE, at, status};
use anyhow::{Result, bail};
use dirty_model::Errno;
use harness::{Context, Skip};
use mdev_dma::MdevDma;
use std::sync::Arc;
use vfio_client::{
    Container, DeviceNode, Group, Leave, MapArgs, Memory,
    uapi::{VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE},
};

/// Pages of memory that the device has.
const PAGES: u64 = 4;

/// A device that is open by iommufd, its memory, and its group, opened once more.
pub struct Reopened {
    // Closed in this order.
    pub device: MdevDma,
    pub node: DeviceNode,
    pub group: Group,
    pub memory: Arc<Memory>,
}

impl Reopened {
    /// Closes the file of a group whose device is open, and opens it again; returns `None` if that is
    /// refused, as it must be. Skips the scenario if the kernel has no iommufd.
    pub fn new(context: &Context<'_>) -> Result<Option<Self>> {
        let node = context.device(0)?.node()?;
        let container = match status(Container::by_iommufd(Group::open(&node)?))? {
            Err(Errno::ENOENT) => return Err(Skip("this kernel has no /dev/iommu".into()).into()),
            Err(errno) => bail!("a group in iommufd: {errno}"),
            Ok(container) => container,
        };
        let size = PAGES * PAGE;
        let memory = Arc::new(Memory::new(size as usize)?);
        let flags = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE;
        let (offset, iova, argsz) = (0, at(0, 0), None);
        container.map(&MapArgs { memory: &memory, offset, iova, size, flags, argsz })?;
        let device = MdevDma::open(&container, &node)?;
        container.detach(node.group(), Leave::Close)?;
        match status(Group::open(&node))? {
            Ok(group) => Ok(Some(Self { device, node, group, memory })),
            Err(Errno::EBUSY) => Ok(None),
            Err(errno) => bail!("the group, opened once more: {errno}"),
        }
    }
}
