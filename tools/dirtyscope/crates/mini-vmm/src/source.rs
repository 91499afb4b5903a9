// SPDX-License-Identifier: GPL-2.0-only

use crate::{
    Error, Result, Vmm,
    wire::{CHUNK, Message},
};
use std::{io::Write, ops::Range, os::unix::net::UnixStream};
use vfio_bindings::bindings::vfio::{
    VFIO_MIGRATION_P2P, VFIO_MIGRATION_PRE_COPY, VFIO_MIGRATION_STOP_COPY,
};
use vfio_client::MigState;
use vfio_ioctls::{VfioDevice, VfioError};
use vm_memory::WriteVolatile;

/// `ENOMSG`: a device in PRE_COPY has no more data for now.
const ENOMSG: i32 = rustix::io::Errno::NOMSG.raw_os_error();

/// How far a migration is.
#[derive(Clone, Copy, Debug, Default)]
pub struct Progress {
    /// Passes, the one that goes on included: 1 in that in which all memory is sent.
    pub passes: u64,
    /// Bytes of memory and devices that were sent.
    pub sent: u64,
    /// Bytes of memory that were sent in the last pass: as many will be dirty after the next one, if they
    /// are written as fast as before.
    pub last_pass: u64,
    /// Bytes of the devices' state that were sent.
    pub device_data: u64,
}

/// Decides how a migration goes on.
pub trait Policy {
    /// Called after each pass of pre-copy, while the machine runs. Returns whether to stop it now, for the
    /// last pass. An error ends the migration, and the machine goes on.
    fn after_pass(&mut self, progress: &Progress) -> Result<bool>;

    /// Called when the machine is stopped, before the last pass. An error ends the migration, and the
    /// machine goes on.
    fn stopped(&mut self, progress: &Progress) -> Result<()>;
}

/// Migrates a machine to where [`receive`](crate::receive) has the other end of `connection`. It is stopped
/// when this returns, and must not run again: it is there.
///
/// If it fails, the machine runs here. Should the connection have broken in the last moment, the other side
/// may have the machine as well, but hasn't let it run: who calls [`Vmm::run`] there has to know that
/// this has succeeded here.
pub fn send(vmm: &Vmm, connection: UnixStream, policy: &mut impl Policy) -> Result<Progress> {
    let abilities = vmm.abilities()?;
    let mut source = Source { vmm, connection, progress: Progress::default() };
    // Before the first page is sent: a page that is written later must be in the next bitmap.
    vmm.start_tracking()?;
    let sent = source.pre_copy(abilities, policy).and_then(|()| {
        source.stop(abilities)?;
        policy.stopped(&source.progress)?;
        source.last_pass()
    });
    // Whatever came of it: bitmaps take memory, and START of the next migration needs new ones. Should it
    // fail, the machine is where it is all the same, and the container's end ends tracking as well.
    let _ = vmm.stop_tracking();
    if sent.is_err() {
        // From wherever it is. If a device can't, there is no machine any more, which is worse news.
        vmm.run()?;
    }
    sent.map(|()| source.progress)
}

/// What all devices of a machine can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Abilities {
    /// They have states in which they don't access others, but take their accesses.
    p2p: bool,
    /// They have state to send while they run.
    pre_copy: bool,
}

impl Abilities {
    /// From the flags `VFIO_MIGRATION_*` of each device, if it can be migrated. Fails if they can't all be.
    fn of(flags: &[Option<u64>]) -> Result<Self> {
        let all = |flag: u32| flags.iter().all(|of| of.is_some_and(|of| of & u64::from(flag) != 0));
        let p2p = all(VFIO_MIGRATION_P2P);
        if !all(VFIO_MIGRATION_STOP_COPY) {
            return Err(Error::Unable("a device has no STOP_COPY".into()));
        }
        // While one is stopped, and another one isn't yet, that must not wait for the first.
        if flags.len() > 1 && !p2p {
            return Err(Error::Unable("several devices, and not all have P2P".into()));
        }
        Ok(Self { p2p, pre_copy: all(VFIO_MIGRATION_PRE_COPY) })
    }
}

impl Vmm {
    fn abilities(&self) -> Result<Abilities> {
        let flags = self.devices().iter().map(VfioDevice::query_migration_support);
        Abilities::of(&flags.collect::<std::result::Result<Vec<_>, _>>()?)
    }

    /// Whether devices have RUNNING_P2P.
    pub(crate) fn is_p2p(&self) -> bool {
        self.abilities().is_ok_and(|abilities| abilities.p2p)
    }
}

/// A migration that goes on.
struct Source<'a> {
    vmm: &'a Vmm,
    connection: UnixStream,
    progress: Progress,
}

impl Source<'_> {
    /// Sends memory while the machine runs: all of it, then what was written meanwhile, and so on.
    fn pre_copy(&mut self, abilities: Abilities, policy: &mut impl Policy) -> Result<()> {
        if abilities.pre_copy {
            self.vmm.set_states(MigState::PreCopy)?;
        }
        // What is hidden from the devices as well: it is the machine's memory all the same.
        let mut dirty: Vec<_> = self.vmm.regions().collect();
        loop {
            self.send_pass(&dirty)?;
            if abilities.pre_copy {
                self.send_pre_copy_data()?;
            }
            // To stop is decided with all sent that bitmaps have said: type1 won't say it again.
            if policy.after_pass(&self.progress)? {
                return Ok(());
            }
            dirty = self.vmm.dirty()?;
        }
    }

    /// Stops the devices. (A VMM with CPUs stops these before, since they use the devices.)
    fn stop(&mut self, abilities: Abilities) -> Result<()> {
        // First none begins DMA any more, then none takes any: a device that is stopped doesn't answer, and
        // must not be waited for.
        match abilities {
            Abilities { p2p: true, pre_copy: true } => self.vmm.set_states(MigState::PreCopyP2p)?,
            Abilities { p2p: true, .. } => self.vmm.set_states(MigState::RunningP2p)?,
            _ => {}
        }
        // From PRE_COPY straight there, and not by STOP: that would end the data file, and what was
        // read from it would be worth nothing.
        self.vmm.set_states(MigState::StopCopy)
    }

    /// Sends what is left of a machine that is stopped.
    fn last_pass(&mut self) -> Result<()> {
        // After the devices were stopped, since they have written until then: in a bitmap that was read
        // before, these pages are missing. Before STOP of tracking, which forgets them.
        let dirty = self.vmm.dirty()?;
        self.send_pass(&dirty)?;
        for device in 0..self.vmm.devices().len() {
            // Until the end of the file, however much the device said that it would be.
            while self.send_device_data(device, CHUNK)? > 0 {}
        }
        Message::End.write(&mut self.connection)?;
        // A device may refuse its state. As long as the other side hasn't said that it has everything, the
        // machine can go on here.
        match Message::read(&mut self.connection)? {
            Message::Taken => Ok(()),
            other => Err(Error::Protocol(format!("{other:?} at the end"))),
        }
    }

    /// Sends these ranges of memory.
    fn send_pass(&mut self, ranges: &[Range<u64>]) -> Result<()> {
        self.progress.passes += 1;
        self.progress.last_pass = 0;
        for &Range { start: address, end } in ranges {
            let length = end - address;
            Message::Memory { address, length }.write(&mut self.connection)?;
            self.connection.write_all_volatile(&self.vmm.slice(address, length)?)?;
            self.progress.last_pass += length;
            self.progress.sent += length;
        }
        Ok(())
    }

    /// Sends the state that devices have while they run. All there is: one that has sent its initial bytes
    /// is stopped for a shorter time.
    fn send_pre_copy_data(&mut self) -> Result<()> {
        for (number, device) in self.vmm.devices().iter().enumerate() {
            let info = device.mig_get_precopy_info()?;
            // No more than it has now: a device that changes could go on forever.
            let mut left = info.initial_bytes + info.dirty_bytes;
            while left > 0 {
                match self.send_device_data(number, left.min(CHUNK)) {
                    Err(Error::Vfio(VfioError::VfioMigrationDataIo(error)))
                        if error.raw_os_error() == Some(ENOMSG) =>
                    {
                        break;
                    }
                    sent => left -= sent?,
                }
            }
        }
        Ok(())
    }

    /// Reads a device's data file once, and sends what that has. Returns how many bytes these are, at most
    /// so many; 0 at the end.
    fn send_device_data(&mut self, number: usize, most: u64) -> Result<u64> {
        let mut bytes = vec![0; most as usize];
        let length = self.vmm.devices()[number].read_migration_data(&mut bytes)? as u64;
        if length > 0 {
            Message::DeviceData { device: number as u64, length }.write(&mut self.connection)?;
            self.connection.write_all(&bytes[..length as usize])?;
            self.progress.device_data += length;
            self.progress.sent += length;
        }
        Ok(length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_devices_must_be_able_to_do() {
        let (stop_copy, p2p) = (u64::from(VFIO_MIGRATION_STOP_COPY), u64::from(VFIO_MIGRATION_P2P));
        let all = stop_copy | p2p | u64::from(VFIO_MIGRATION_PRE_COPY);
        let of = |flags: &[Option<u64>]| Abilities::of(flags).ok();
        assert_eq!(of(&[Some(stop_copy)]), Some(Abilities { p2p: false, pre_copy: false }));
        assert_eq!(of(&[Some(all), Some(all)]), Some(Abilities { p2p: true, pre_copy: true }));
        let mixed = [Some(all), Some(stop_copy | p2p)];
        assert_eq!(of(&mixed), Some(Abilities { p2p: true, pre_copy: false }));
        assert_eq!(of(&[Some(all), Some(stop_copy)]), None);
        assert_eq!(of(&[Some(all), None]), None);
        assert_eq!(of(&[Some(p2p)]), None);
    }
}
