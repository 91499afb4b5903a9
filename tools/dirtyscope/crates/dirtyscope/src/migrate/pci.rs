// SPDX-License-Identifier: GPL-2.0-only

//! The device as a PCI function that QEMU gives to a machine.

use super::{
    bed::Bed,
    cases::{Case, WINDOW, case},
    contents::PAGE,
};
use crate::scenarios::Skip;
use anyhow::{Context as _, Result, anyhow, ensure};
use mdev_dma::{Op, uapi::RUST_MDEV_DMA_IRQ_COMMAND};
use qemu_client::Width;
use std::{fmt::Write as _, fs, process::Command};

/// These cases.
pub const CASES: &[Case] = &[
    case("pci/lspci", "lspci -vvv understands configuration space", lspci),
    case("pci/intx", "a command that ends raises INTx, until that is acknowledged", intx),
    case("pci/msi", "a command that ends sends a message, also where the machine migrates to", msi),
];

/// What lspci must find, once BAR 0 and DMA are set up.
const FOUND: &[&str] = &[
    "1234:4d44",
    "Mem+ BusMaster+",
    "INTx-",
    "Interrupt: pin A",
    "Region 0: Memory at e0040000 (32-bit, non-prefetchable)",
    "Capabilities: [",
    "MSI: Enable- Count=1/2 Maskable- 64bit+",
];

/// What it says of what it doesn't understand.
const NOT_UNDERSTOOD: &[&str] = &["!!!", "??", "unknown header", "broken", "Unknown"];

fn lspci(bed: &mut Bed<'_>) -> Result<()> {
    bed.start(1)?;
    let mut dump = String::from("00:04.0 the device\n");
    for (i, line) in bed.here().device(0).config_space()?.chunks(16).enumerate() {
        let bytes: Vec<_> = line.iter().map(|byte| format!("{byte:02x}")).collect();
        writeln!(dump, "{:02x}: {}", i * 16, bytes.join(" "))?;
    }
    let file = bed.file("config-space");
    fs::write(&file, &dump).context("write the dump for lspci")?;
    let output = Command::new("lspci").args(["-vvv", "-nn", "-F"]).arg(&file).output();
    let output = output.map_err(|error| anyhow!(Skip(format!("lspci: {error}"))))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "lspci, {}: {errors}", output.status);
    for what in FOUND {
        ensure!(text.contains(what), "lspci doesn't say \"{what}\":\n{text}\n{dump}");
    }
    for what in NOT_UNDERSTOOD {
        ensure!(!text.contains(what), "lspci says \"{what}\":\n{text}\n{dump}");
    }
    Ok(())
}

fn intx(bed: &mut Bed<'_>) -> Result<()> {
    bed.start(1)?;
    bed.here().qtest().watch_interrupts("ioapic")?;
    bed.here().device(0).enable_interrupts(RUST_MDEV_DMA_IRQ_COMMAND)?;
    for _ in 0..2 {
        bed.begin_write(0, WINDOW)?;
        bed.until("for INTx to be raised", |machine| {
            machine.device(0).check_config()?;
            Ok(!machine.qtest().raised().is_empty())
        })?;
        let device = bed.here().device(0);
        ensure!(device.status()? == 0, "there was an interrupt before the command had ended");
        ensure!(device.events()? == RUST_MDEV_DMA_IRQ_COMMAND, "events {:#x}", device.events()?);
        device.clear_events(RUST_MDEV_DMA_IRQ_COMMAND)?;
        bed.until("for INTx to be lowered", |machine| {
            machine.device(0).check_config()?;
            Ok(machine.qtest().raised().is_empty())
        })?;
    }
    Ok(())
}

fn msi(bed: &mut Bed<'_>) -> Result<()> {
    /// The page that messages go to.
    const PAGE_OF_MESSAGE: u64 = WINDOW.start - 1;
    const ADDRESS: u64 = PAGE_OF_MESSAGE * PAGE;
    const DATA: u16 = 0x4300;

    bed.start(1)?;
    bed.here().device(0).enable_msi(ADDRESS as u32, DATA)?;
    for migrations in 0..3 {
        if migrations > 0 {
            // The device makes the page what everybody can compute; that isn't to be told to it.
            bed.here().device(0).enable_interrupts(0)?;
            bed.write(0, Op::DmaWrite, PAGE_OF_MESSAGE..PAGE_OF_MESSAGE + 1)?;
            bed.begin()?;
            bed.passes(1)?;
            bed.complete()?;
        }
        bed.here().device(0).enable_interrupts(RUST_MDEV_DMA_IRQ_COMMAND)?;
        bed.begin_write(0, WINDOW)?;
        bed.until("for a message", |machine| {
            Ok(machine.qtest().read(ADDRESS, Width::Long)? == u64::from(DATA))
        })?;
        let status = bed.here().device(0).status()?;
        ensure!(status == 0, "there was a message, and the command's status is {status}");
    }
    Ok(())
}
