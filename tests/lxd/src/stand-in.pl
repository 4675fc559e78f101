#!/usr/bin/perl
# Stands in for the streamer and its supervisor in a container: says what the contract of guests wants said, and does
# what the application's command says.
use strict;
use warnings;

my $folder = '/var/lib/fanlight';

sub slurp {
    open(my $file, '<', "$folder/$_[0]") or return '';
    local $/;
    return <$file>;
}

sub say_state {
    my ($run, $phase) = @_;
    open(my $file, '>', "$folder/state.new") or die "state: $!";
    print $file qq({"version":1,"run":$run,"phase":$phase,"status":"at work"});
    close($file);
    rename("$folder/state.new", "$folder/state.json") or die "state: $!";
}

sub power_off {
    exec('systemctl', '--no-block', 'poweroff');
}

sub log_line {
    mkdir('/var/log/fanlight');
    open(my $log, '>>', '/var/log/fanlight/streamer.log') or die "log: $!";
    print $log "$_[0]\n";
    close($log);
}

if (($ARGV[1] // '') eq 'wait') {
    my $wanted = $ARGV[3];
    while (1) {
        my $state = slurp('state.json');
        my ($run) = $state =~ /"run":(\d+)/;
        if (defined $run && $run >= $wanted && $state =~ /"phase":("ready"|\{)/) {
            print $state;
            exit 0;
        }
        select(undef, undef, undef, 0.02);
    }
}

my ($run) = slurp('run.json') =~ /"run":(\d+)/ or die 'no run';
my ($what) = slurp('guest.json') =~ /"command":\["([^"]*)"/ or die 'no command';
my $before = slurp('state.json');
power_off() if $before =~ /"run":$run\b/ && $before =~ /"ended"/;
say_state($run, '"starting"');
log_line("run $run: $what");
$SIG{TERM} = sub {
    say_state($run, '{"ended":{"reason":"stopped","message":"asked to stop"}}');
    exit 0;
};
$SIG{TERM} = 'IGNORE' if $what eq 'stubborn';
if ($what eq 'fail') {
    say_state($run, '{"ended":{"reason":"failed","message":"the application said no"}}');
    power_off();
}
say_state($run, '"ready"') unless $what eq 'hang';
if ($what eq 'finish') {
    say_state($run, '{"ended":{"reason":"finished","message":"done"}}');
    power_off();
}
power_off() if $what eq 'vanish';
sleep 1000 while 1;
