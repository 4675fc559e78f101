#!/usr/bin/perl
# Stands in for the streamer: reads the guest file, says that it is ready, and does what the application's command says.
use strict;
use warnings;
use Socket;

my $guest = do { local $/; <STDIN> };
my ($what) = $guest =~ /"command":\["([^"]*)"/ or exit 78;
my ($path) = $guest =~ /"command":\["[^"]*","([^"]*)"/;

sub notify {
    socket(my $socket, AF_UNIX, SOCK_DGRAM, 0) or die "socket: $!";
    send($socket, $_[0], 0, sockaddr_un($ENV{NOTIFY_SOCKET})) or die "notify: $!";
}

sub application_log {
    open(my $log, '>>', "$ENV{FANLIGHT_LOG_DIR}/application.log") or die "log: $!";
    print $log @_;
    close($log);
}

$SIG{TERM} = sub {
    notify('X_FANLIGHT_RESULT={"reason":"stopped","message":"asked to stop"}');
    exit 0;
};
print STDERR "streamer: $what\n";
$SIG{TERM} = 'IGNORE' if $what eq 'stubborn';
exit 70 if $what eq 'exit';
kill 'SEGV', $$ if $what eq 'crash';
if ($what eq 'fail') {
    notify('X_FANLIGHT_RESULT={"reason":"failed","message":"the application said no"}');
    exit 70;
}
notify("STATUS=at work\nREADY=1") unless $what eq 'hang';
if ($what eq 'finish') {
    notify('X_FANLIGHT_RESULT={"reason":"finished","message":"done"}');
    exit 0;
}
if ($what eq 'fork') {
    # A daemon that wants to stay: own session, no ties.
    if (fork() == 0) { setpgrp(0, 0); exec('sleep', $path); }
    sleep 1000 while 1;
}
if ($what eq 'eat') {
    my @eaten;
    push @eaten, 'x' x (1 << 20) while 1;
}
if ($what eq 'breed') {
    my $children = 0;
    while (defined(my $pid = fork())) {
        if ($pid == 0) { sleep 1000 while 1; }
        $children++;
    }
    application_log("$children children\n");
}
if ($what eq 'links') {
    symlink('/etc/passwd', "$ENV{FANLIGHT_LOG_DIR}/passwd.log");
    symlink($path, "$ENV{FANLIGHT_LOG_DIR}/secret.log");
    system('mkfifo', "$ENV{FANLIGHT_LOG_DIR}/pipe.log");
    application_log("done\n");
}
if ($what eq 'probe') {
    my %verdict;
    my ($handle, @found);
    my $try = sub { $verdict{$_[0]} = $_[1] ? 'REACHED' : 'refused' };
    $try->('state folder', -e $path);
    $try->('state folder parent', opendir($handle, $path =~ s{/[^/]+$}{}r) && (@found = readdir($handle)) > 2);
    $try->('root home', opendir($handle, '/root'));
    $try->('shadow', open($handle, '<', '/etc/shadow'));
    $try->('write to usr', open($handle, '>', '/usr/fanlight-was-here'));
    $try->('write to root', open($handle, '>', '/fanlight-was-here'));
    $try->('write to package', open($handle, '>', '/app/fanlight-was-here'));
    my @pids = grep { /^\d+$/ } do { opendir(my $d, '/proc') or die; readdir($d) };
    $try->('processes of the host', @pids > 12);
    $try->('environment of the first process', open($handle, '<', '/proc/1/environ') && length(do { local $/; <$handle> } // '') && $> == 0);
    $try->('root', $> == 0 || $< == 0);
    my $status = do { open(my $f, '<', '/proc/self/status') or die; local $/; <$f> };
    $try->('capabilities', $status !~ /^CapEff:\s+0+$/m);
    $try->('permitted capabilities', $status !~ /^CapPrm:\s+0+$/m);
    $try->('new privileges', $status !~ /^NoNewPrivs:\s+1$/m);
    $try->('kill of the host\'s first process', kill(0, 2) && @pids > 12);
    $try->('sockets of the host', -e '/run/dbus' || -e '/run/systemd' || -e '/run/docker.sock');
    $try->('mount', system('mount -t tmpfs tmpfs /mnt 2>/dev/null') == 0);
    $try->('disks', (@found = grep { -b $_ } glob('/dev/*')) > 0);
    my %own = map { $_ => 1 } ($ENV{HOME}, $ENV{XDG_RUNTIME_DIR}, $ENV{FANLIGHT_LOG_DIR}, '/tmp', '/dev/shm', '/var/tmp');
    for my $folder (sort keys %own) {
        $verdict{"own $folder"} = open(my $f, '>', "$folder/mine") ? 'possible' : 'IMPOSSIBLE';
    }
    $verdict{'package'} = -e '/app/manifest.yaml' ? 'possible' : 'IMPOSSIBLE';
    use Cwd;
    $verdict{'at home'} = getcwd() eq $ENV{HOME} ? 'possible' : 'IMPOSSIBLE';
    $verdict{'name'} = (getpwuid($>))[0] eq 'fanlight' ? 'possible' : 'IMPOSSIBLE';
    application_log(join('', map { "$_: $verdict{$_}\n" } sort keys %verdict), "end\n");
}
sleep 1000 while 1;
