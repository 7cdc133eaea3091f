{#- The day of a timestamp in the time zone of the fraud rules. On the first and the last day of the calendar, which may have no
    neighbour there, it is the day in UTC. -#}
{%- macro local_date(timestamp_column) -%}
    if(
            {{ timestamp_column }} between timestamp '0001-01-02' and timestamp '9999-12-30',
            date({{ timestamp_column }}, '{{ var("time_zone") }}'),
            date({{ timestamp_column }})
        )
{%- endmacro -%}
