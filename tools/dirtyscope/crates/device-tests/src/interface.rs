// SPDX-License-Identifier: GPL-2.0-only

//! What VFIO's user sees: information, configuration space, registers.

use anyhow::{Result, ensure};
use dirty_model::Errno;
use harness::{Context, Scenario, Skip, scenario};
use mdev_dma::{GeneratorConfig, MdevDma, Opcode, Width, uapi};
use testbed::{
    Op, PAGE, Testbed, at,
    fixture::{LONG, refused},
    same,
    slots::{PINNING, can_promote},
    status,
};
use vfio_client::{
    DeviceInfo, IrqInfo, RegionInfo,
    uapi::{
        VFIO_DEVICE_FEATURE_DMA_LOGGING_START, VFIO_DEVICE_FEATURE_GET, VFIO_DEVICE_FEATURE_MASK,
        VFIO_DEVICE_FEATURE_MIGRATION, VFIO_DEVICE_FEATURE_PROBE, VFIO_DEVICE_FEATURE_SET,
        VFIO_DEVICE_FLAGS_PCI, VFIO_DEVICE_FLAGS_RESET, VFIO_IRQ_INFO_AUTOMASKED,
        VFIO_IRQ_INFO_EVENTFD, VFIO_IRQ_INFO_MASKABLE, VFIO_IRQ_INFO_NORESIZE,
        VFIO_PCI_BAR0_REGION_INDEX, VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_ERR_IRQ_INDEX,
        VFIO_PCI_INTX_IRQ_INDEX, VFIO_PCI_MSI_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX,
        VFIO_PCI_NUM_IRQS, VFIO_PCI_NUM_REGIONS, VFIO_PCI_REQ_IRQ_INDEX,
        VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE,
    },
};

pub const SCENARIOS: &[Scenario] = &[
    scenario(
        "device/interface/info",
        "GET_INFO, GET_REGION_INFO and GET_IRQ_INFO describe a PCI function with one BAR",
        info,
    ),
    scenario(
        "device/interface/bad-ioctl",
        "short argsz and bad indices are EINVAL, unknown ioctls and features ENOTTY",
        bad_ioctl,
    ),
    scenario(
        "device/interface/config-space",
        "configuration space is that of a function with a BAR of 4 KiB, INTx and MSI",
        config_space,
    ),
    scenario(
        "device/interface/register-widths",
        "registers are read and written with 1, 2, 4 and 8 bytes",
        register_widths,
    ),
    scenario(
        "device/interface/read-only-registers",
        "writes to read-only registers, and between registers, are ignored",
        read_only_registers,
    ),
    scenario(
        "device/interface/bad-access",
        "odd widths, unaligned accesses and those outside of a region are EINVAL",
        bad_access,
    ),
    scenario(
        "device/interface/edu",
        "rust_vfio_edu refuses what it hasn't: a background, a generator, and what is no register",
        edu,
    ),
];

/// Bytes of the configuration space.
const CONFIG_SIZE: u64 = 256;

fn info(context: &Context<'_>) -> Result<()> {
    let bed = Testbed::new(context)?;
    let device = bed.device(0).device();
    let expected = DeviceInfo {
        flags: VFIO_DEVICE_FLAGS_PCI | VFIO_DEVICE_FLAGS_RESET,
        num_regions: VFIO_PCI_NUM_REGIONS,
        num_irqs: VFIO_PCI_NUM_IRQS,
    };
    let info = device.info(None)?;
    ensure!(info == expected, "GET_INFO: {info:x?}");

    for index in 0..VFIO_PCI_NUM_REGIONS {
        let size = match index {
            VFIO_PCI_BAR0_REGION_INDEX => uapi::RUST_MDEV_DMA_BAR_SIZE.into(),
            VFIO_PCI_CONFIG_REGION_INDEX => CONFIG_SIZE,
            _ => 0,
        };
        let flags = match size {
            0 => 0,
            _ => VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE,
        };
        let offset = u64::from(index) << uapi::RUST_MDEV_DMA_REGION_SHIFT;
        let info = device.region_info(index, None)?;
        ensure!(info == RegionInfo { flags, size, offset }, "region {index}: {info:x?}");
    }
    let single = VFIO_IRQ_INFO_EVENTFD | VFIO_IRQ_INFO_NORESIZE;
    for (index, flags, count) in [
        (
            VFIO_PCI_INTX_IRQ_INDEX,
            VFIO_IRQ_INFO_EVENTFD | VFIO_IRQ_INFO_MASKABLE | VFIO_IRQ_INFO_AUTOMASKED,
            1,
        ),
        (VFIO_PCI_MSI_IRQ_INDEX, single, uapi::RUST_MDEV_DMA_MSI_VECTORS),
        (VFIO_PCI_MSIX_IRQ_INDEX, 0, 0),
        (VFIO_PCI_ERR_IRQ_INDEX, single, 1),
        (VFIO_PCI_REQ_IRQ_INDEX, single, 1),
    ] {
        let info = device.irq_info(index, None)?;
        ensure!(info == IrqInfo { flags, count }, "interrupt {index}: {info:x?}");
    }
    Ok(())
}

fn bad_ioctl(context: &Context<'_>) -> Result<()> {
    let bed = Testbed::new(context)?;
    let device = bed.device(0).device();
    let check = |what: &str, expected: Errno, result| -> Result<()> {
        let found = status(result)?;
        ensure!(found == Err(expected), "{what}: {found:?}, not {expected}");
        Ok(())
    };
    for argsz in [0, 15] {
        let what = format!("argsz {argsz}");
        check(&what, Errno::EINVAL, device.info(Some(argsz)).map(drop))?;
        check(&what, Errno::EINVAL, device.region_info(0, Some(argsz)).map(drop))?;
        check(&what, Errno::EINVAL, device.irq_info(0, Some(argsz)).map(drop))?;
    }
    for index in [VFIO_PCI_NUM_REGIONS, u32::MAX] {
        let what = format!("index {index}");
        check(&what, Errno::EINVAL, device.region_info(index, None).map(drop))?;
        check(&what, Errno::EINVAL, device.irq_info(index, None).map(drop))?;
    }
    check("irq 5", Errno::EINVAL, device.irq_info(VFIO_PCI_NUM_IRQS, None).map(drop))?;
    for nr in [12, 99] {
        check(&format!("ioctl {nr}"), Errno::ENOTTY, device.ioctl_null(nr))?;
    }

    let (get, set) = (VFIO_DEVICE_FEATURE_GET, VFIO_DEVICE_FEATURE_SET);
    let probe = VFIO_DEVICE_FEATURE_PROBE;
    let unknown = VFIO_DEVICE_FEATURE_MASK;
    check("feature", Errno::ENOTTY, device.feature(get | unknown, None))?;
    check("probing a feature", Errno::ENOTTY, device.feature(probe | get | unknown, None))?;
    let migration = VFIO_DEVICE_FEATURE_MIGRATION;
    check("migration", Errno::EINVAL, device.feature(set | migration, None))?;
    let logging = VFIO_DEVICE_FEATURE_DMA_LOGGING_START;
    check("logging", Errno::ENOTTY, device.feature(probe | set | logging, None))?;
    check("GET and SET", Errno::EINVAL, device.feature(get | set | unknown, None))?;
    check("argsz 7", Errno::EINVAL, device.feature(get | unknown, Some(7)))
}

/// Where the configuration space begins in the device's file.
fn config_offset(device: &MdevDma) -> Result<u64> {
    Ok(device.device().region_info(VFIO_PCI_CONFIG_REGION_INDEX, None)?.offset)
}

fn config_space(context: &Context<'_>) -> Result<()> {
    let bed = Testbed::new(context)?;
    let (device, config) = (bed.device(0).device(), config_offset(bed.device(0))?);

    let mut all = [0xff; CONFIG_SIZE as usize + 16];
    let n = device.read_at(config, &mut all)?;
    same("bytes read of the configuration space", CONFIG_SIZE, n as u64)?;
    let all = &all[..n];
    let word = |at: usize| u64::from(u16::from_le_bytes([all[at], all[at + 1]]));
    same("vendor id", uapi::RUST_MDEV_DMA_PCI_VENDOR_ID.into(), word(0))?;
    same("device id", uapi::RUST_MDEV_DMA_PCI_DEVICE_ID.into(), word(2))?;
    same("header type", 0, all[0x0e].into())?;

    for (offset, len) in [(0, 1), (1, 3), (2, 2), (5, 11), (200, 56), (255, 1), (255, 9)] {
        let mut part = vec![0; len];
        let n = device.read_at(config + offset as u64, &mut part)?;
        same("bytes read", len.min(all.len() - offset) as u64, n as u64)?;
        ensure!(part[..n] == all[offset..offset + n], "{len} bytes at {offset}");
    }

    // What a driver sees that follows the list of capabilities.
    same("capability list", 0x10, word(0x06) & 0x10)?;
    same("interrupt pin", 1, all[0x3d].into())?;
    let msi = usize::from(all[0x34]);
    same("capability MSI, and none behind it", 0x0005, word(msi))?;
    same("64 bits, two vectors", 0x0082, word(msi + 2))?;

    // What a driver or firmware writes, and what comes of it: the size of the BAR, what
    // is read-only.
    let msi = msi as u64;
    for (offset, written, expected) in [
        (0x10, u32::MAX, !(uapi::RUST_MDEV_DMA_BAR_SIZE - 1)),
        (0x10, 0xfebf_1234, 0xfebf_1000),
        (0x00, 0, u32::from_le_bytes([all[0], all[1], all[2], all[3]])),
        (0x04, u32::MAX, 0x0010_0406),
        (0x04, 0, 0x0010_0000),
        (0x14, u32::MAX, 0),
        (0x2c, 0, u32::from_le_bytes([all[0x2c], all[0x2d], all[0x2e], all[0x2f]])),
        (0x34, u32::MAX, msi as u32),
        (0x3c, u32::MAX, 0x01ff),
        (msi, u32::MAX, 0x00f3_0005),
        (msi, 0, 0x0082_0005),
        (msi + 4, u32::MAX, 0xffff_fffc),
        (msi + 8, u32::MAX, u32::MAX),
        (msi + 12, u32::MAX, 0xffff),
    ] {
        device.write_at(config + offset, &written.to_le_bytes())?;
        let mut found = [0; 4];
        device.read_at(config + offset, &mut found)?;
        let what = format!("configuration space at {offset:#x}, after writing {written:#x}");
        same(&what, expected.into(), u32::from_le_bytes(found).into())?;
    }
    Ok(())
}

fn register_widths(context: &Context<'_>) -> Result<()> {
    const VALUE: u64 = 0x8877_6655_4433_2211;
    let bed = Testbed::new(context)?;
    let device = bed.device(0);
    let widths = [Width::Byte, Width::Word, Width::Long, Width::Quad];
    let registers = [
        uapi::RUST_MDEV_DMA_REG_IOVA,
        uapi::RUST_MDEV_DMA_REG_LENGTH,
        uapi::RUST_MDEV_DMA_REG_SEED,
    ];
    for register in registers {
        for width in widths {
            device.write(register, Width::Quad, 0)?;
            let bits = 8 * width as u32;
            for part in 0..8 / width as u32 {
                device.write(register + part * width as u32, width, VALUE >> (part * bits))?;
            }
            same("register", VALUE, device.read(register, Width::Quad)?)?;
            for part in 0..8 / width as u32 {
                let expected = (VALUE >> (part * bits)) & (u64::MAX >> (64 - bits));
                let found = device.read(register + part * width as u32, width)?;
                same(&format!("part of a register of width {width:?}"), expected, found)?;
            }
        }
    }
    for width in widths {
        let expected = u64::from(uapi::RUST_MDEV_DMA_MAGIC) & (u64::MAX >> (64 - 8 * width as u32));
        let found = device.read(uapi::RUST_MDEV_DMA_REG_MAGIC, width)?;
        same("MAGIC", expected, found & u64::from(u32::MAX))?;
    }
    let ops = Opcode::ALL.iter().fold(0, |ops, &op| ops | (1 << op as u32));
    same("OPS", ops, device.read(uapi::RUST_MDEV_DMA_REG_OPS, Width::Long)?)
}

fn read_only_registers(context: &Context<'_>) -> Result<()> {
    let bed = Testbed::new(context)?;
    let device = bed.device(0);
    let writable = [
        uapi::RUST_MDEV_DMA_REG_IOVA..uapi::RUST_MDEV_DMA_REG_STATUS,
        uapi::RUST_MDEV_DMA_REG_IRQ_ENABLE..uapi::RUST_MDEV_DMA_REG_IRQ_ENABLE + 4,
        uapi::RUST_MDEV_DMA_REG_GEN_IOVA..uapi::RUST_MDEV_DMA_REG_GEN_STATUS,
    ];
    let limits = uapi::RUST_MDEV_DMA_REG_MAX_LENGTH + 8;
    for register in (0..uapi::RUST_MDEV_DMA_BAR_SIZE).step_by(4) {
        if writable.iter().any(|range| range.contains(&register)) {
            continue;
        }
        let before = device.read(register, Width::Long)?;
        device.write(register, Width::Long, !before)?;
        same(&format!("read-only {register:#x}"), before, device.read(register, Width::Long)?)?;
        if register >= limits {
            same(&format!("nothing has happened, register {register:#x}"), 0, before)?;
        }
    }
    same("PINS", 0, device.pins()?)
}

fn bad_access(context: &Context<'_>) -> Result<()> {
    let bed = Testbed::new(context)?;
    let (device, bar) = (bed.device(0).device(), bed.device(0).bar_offset());
    let end = bar + u64::from(uapi::RUST_MDEV_DMA_BAR_SIZE);
    let config = config_offset(bed.device(0))?;
    let mut bad = vec![
        (bar, 3),
        (bar, 5),
        (bar, 16),
        (bar, 4096),
        (bar + 1, 2),
        (bar + 2, 4),
        (bar + 4, 8),
        (end - 4, 8),
        (end, 1),
        (end, 4),
        (end + 4096, 4),
        (config + CONFIG_SIZE, 1),
        (config + CONFIG_SIZE, 4),
        ((1 << 63) - 4096, 4),
    ];
    for index in 1..VFIO_PCI_NUM_REGIONS {
        if index != VFIO_PCI_CONFIG_REGION_INDEX {
            bad.push((device.region_info(index, None)?.offset, 4));
        }
    }
    for (offset, len) in bad {
        let mut bytes = vec![0xff; len];
        let read = status(device.read_at(offset, &mut bytes))?;
        ensure!(read == Err(Errno::EINVAL), "read of {len} bytes at {offset:#x}: {read:?}");
        let written = status(device.write_at(offset, &bytes))?;
        ensure!(written == Err(Errno::EINVAL), "write of {len} bytes at {offset:#x}: {written:?}");
    }
    same("PINS", 0, bed.device(0).pins()?)
}

fn edu(context: &Context<'_>) -> Result<()> {
    ensure!(can_promote(), Skip("needs insmod rust_vfio_edu".into()));
    let slot = PINNING[0];
    let mut bed = Testbed::joined(context, slot)?;
    bed.must(Op::Open { device: slot })?;
    let device = bed.device(slot);
    device.run_in_background(Opcode::Pin, at(0, 0), PAGE, 0)?;
    refused("PIN in the background", Errno::EOPNOTSUPP, device.wait(LONG)?)?;
    let mode = uapi::RUST_MDEV_DMA_GEN_PIN;
    let config = GeneratorConfig { iova: at(0, 0), length: PAGE, seed: 1, limit: 1, rate: 0, mode };
    device.start_generator(&config)?;
    same("GEN_STATUS", Errno::EOPNOTSUPP.0 as u64, device.generator()?.status.into())?;
    let (start, size) = (device.bar_offset(), u64::from(uapi::RUST_MDEV_DMA_BAR_SIZE));
    for (offset, len) in [(0, 3), (1, 4), (size - 4, 8), (size, 4)] {
        let mut bytes = vec![0xff; len];
        let read = status(device.device().read_at(start + offset, &mut bytes))?;
        ensure!(read == Err(Errno::EINVAL), "read of {len} bytes at {offset:#x}: {read:?}");
        let written = status(device.device().write_at(start + offset, &bytes))?;
        ensure!(written == Err(Errno::EINVAL), "write of {len} bytes at {offset:#x}: {written:?}");
    }
    Ok(())
}
